// The head map: which query heads share scores, decided in integers (docs: the op, step 1).
#pragma once

#include <cstdint>
#include <vector>

namespace chai {

// rint(1024 * p), half to even, of n probabilities. What is not a number counts as 0.
void quantise(const float* probabilities, std::int64_t n, std::int32_t* quantised);

// K-medoids over KV heads: a greedy choice, then every choice once more.
//   quantised: [num_heads][features], the quantised probabilities of each query head
//   head_map:  [num_heads], receives the representative query head of each query head
// kept is between 1 and num_kv_heads, num_heads a multiple of num_kv_heads.
void cluster_heads(const std::int32_t* quantised, std::int64_t features, std::int64_t num_heads,
                   std::int64_t num_kv_heads, std::int64_t kept, std::int32_t* head_map);

// K-cache slot of each KV head, ascending; -1 where the map does not keep it. Entries of the map are valid.
struct Slots {
  std::vector<std::int32_t> of_kv_head;
  std::int64_t used = 0;
};
Slots assign_slots(const std::int32_t* head_map, std::int64_t num_heads, std::int64_t num_kv_heads);

// The head map with the KV heads given that are kept, those with a slot; otherwise as cluster_heads.
void assign_heads(const std::int32_t* quantised, std::int64_t features, std::int64_t num_heads,
                  std::int64_t num_kv_heads, const Slots& kept, std::int32_t* head_map);

}  // namespace chai
