#include "chai/head_map.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace chai {
namespace {

constexpr float kQuantisationSteps = 1024.0f;
constexpr std::int64_t kUnassigned = std::int64_t{1} << 40;
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

std::int64_t absolute_distance(const std::int32_t* a, const std::int32_t* b, std::int64_t features) {
  std::int64_t sum = 0;
  for (std::int64_t f = 0; f < features; ++f) sum += std::abs(a[f] - b[f]);
  return sum;
}

std::vector<std::int64_t> pairwise_distances(const std::int32_t* quantised, std::int64_t features,
                                             std::int64_t num_heads) {
  std::vector<std::int64_t> distance(num_heads * num_heads, 0);
  for (std::int64_t a = 0; a < num_heads; ++a) {
    for (std::int64_t b = 0; b < a; ++b) {
      const std::int64_t d = absolute_distance(quantised + a * features, quantised + b * features, features);
      distance[a * num_heads + b] = distance[b * num_heads + a] = d;
    }
  }
  return distance;
}

// Distance of query head h to the nearest query head of KV head g, [num_heads][num_kv_heads].
std::vector<std::int64_t> distances_to_kv_heads(const std::vector<std::int64_t>& distance,
                                                std::int64_t num_heads, std::int64_t num_kv_heads) {
  const std::int64_t group = num_heads / num_kv_heads;
  std::vector<std::int64_t> nearest(num_heads * num_kv_heads);
  for (std::int64_t i = 0; i < num_heads * num_kv_heads; ++i) {
    nearest[i] = *std::min_element(distance.begin() + i * group, distance.begin() + (i + 1) * group);
  }
  return nearest;
}

// 2 * kept steps: the KV heads chosen in the last `kept` of them stay, so in the second half each step first
// drops the oldest choice. stamp[g] is the step in which g was last chosen.
std::vector<bool> choose_kv_heads(const std::vector<std::int64_t>& to_kv, std::int64_t num_heads,
                                  std::int64_t num_kv_heads, std::int64_t kept) {
  std::vector<std::int64_t> stamp(num_kv_heads, -kept);
  std::vector<std::int64_t> nearest(num_heads);
  for (std::int64_t step = 0; step < 2 * kept; ++step) {
    for (std::int64_t h = 0; h < num_heads; ++h) {
      nearest[h] = kUnassigned;
      for (std::int64_t g = 0; g < num_kv_heads; ++g) {
        if (stamp[g] > step - kept) nearest[h] = std::min(nearest[h], to_kv[h * num_kv_heads + g]);
      }
    }
    std::int64_t best = -1;
    std::int64_t best_cost = kNever;
    for (std::int64_t g = 0; g < num_kv_heads; ++g) {
      if (stamp[g] > step - kept) continue;
      std::int64_t cost = 0;
      for (std::int64_t h = 0; h < num_heads; ++h) {
        cost += std::min(nearest[h], to_kv[h * num_kv_heads + g]);
      }
      if (cost < best_cost) {
        best_cost = cost;
        best = g;
      }
    }
    stamp[best] = step;
  }
  std::vector<bool> chosen(num_kv_heads);
  for (std::int64_t g = 0; g < num_kv_heads; ++g) chosen[g] = stamp[g] >= kept;
  return chosen;
}

// Each query head to the nearest query head of a chosen KV head, those of chosen ones to themselves.
void assign(const std::vector<std::int64_t>& distance, std::int64_t num_heads, std::int64_t num_kv_heads,
            const std::vector<bool>& chosen, std::int32_t* head_map) {
  const std::int64_t group = num_heads / num_kv_heads;
  for (std::int64_t h = 0; h < num_heads; ++h) {
    std::int64_t representative = h;
    if (!chosen[h / group]) {
      std::int64_t best = kNever;
      for (std::int64_t r = 0; r < num_heads; ++r) {
        const std::int64_t d = distance[h * num_heads + r];
        if (chosen[r / group] && d < best) {
          best = d;
          representative = r;
        }
      }
    }
    head_map[h] = static_cast<std::int32_t>(representative);
  }
}

}  // namespace

void quantise(const float* probabilities, std::int64_t n, std::int32_t* quantised) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float steps = std::nearbyint(probabilities[i] * kQuantisationSteps);
    quantised[i] = steps > 0.0f ? static_cast<std::int32_t>(steps) : 0;
  }
}

void cluster_heads(const std::int32_t* quantised, std::int64_t features, std::int64_t num_heads,
                   std::int64_t num_kv_heads, std::int64_t kept, std::int32_t* head_map) {
  const std::vector<std::int64_t> distance = pairwise_distances(quantised, features, num_heads);
  const std::vector<bool> chosen = choose_kv_heads(distances_to_kv_heads(distance, num_heads, num_kv_heads),
                                                   num_heads, num_kv_heads, kept);
  assign(distance, num_heads, num_kv_heads, chosen, head_map);
}

void assign_heads(const std::int32_t* quantised, std::int64_t features, std::int64_t num_heads,
                  std::int64_t num_kv_heads, const Slots& kept, std::int32_t* head_map) {
  std::vector<bool> chosen(num_kv_heads);
  for (std::int64_t g = 0; g < num_kv_heads; ++g) chosen[g] = kept.of_kv_head[g] >= 0;
  assign(pairwise_distances(quantised, features, num_heads), num_heads, num_kv_heads, chosen, head_map);
}

Slots assign_slots(const std::int32_t* head_map, std::int64_t num_heads, std::int64_t num_kv_heads) {
  const std::int64_t group = num_heads / num_kv_heads;
  Slots slots;
  slots.of_kv_head.assign(num_kv_heads, -1);
  for (std::int64_t h = 0; h < num_heads; ++h) slots.of_kv_head[head_map[h] / group] = 0;
  for (std::int32_t& slot : slots.of_kv_head) {
    if (slot == 0) slot = static_cast<std::int32_t>(slots.used++);
  }
  return slots;
}

}  // namespace chai
