#include <cmath>
#include <string>
#include <vector>

#include "chai/attention.h"
#include "chai/head_map.h"

namespace chai {
namespace {

std::string row_name(std::int64_t b) {
  return "row " + std::to_string(b) + ": ";
}

std::string check_storage(Storage storage, std::int64_t dim, std::int64_t group) {
  if (!quantised(storage)) return "";
  if (group < 1 || dim % group != 0) {
    return "group must divide the head dim " + std::to_string(dim) + ", got " + std::to_string(group);
  }
  if (storage == Storage::kInt4 && group % 2 != 0) {
    return "4 bits need an even group, got " + std::to_string(group);
  }
  return "";
}

std::string check_shape(const AttentionCall& call) {
  const AttentionShape& s = call.shape;
  const std::int64_t dims[] = {s.batch, s.tokens,    s.heads,   s.kv_heads, s.kept,
                               s.pages, s.page_size, s.entries, s.key_dim,  s.value_dim};
  for (std::int64_t dim : dims) {
    if (dim < 1) return "every dimension must be at least 1";
  }
  if (s.heads % s.kv_heads != 0) {
    return std::to_string(s.heads) + " query heads are not a multiple of " + std::to_string(s.kv_heads) +
           " KV heads";
  }
  if (s.kept > s.kv_heads) {
    return "the K cache has " + std::to_string(s.kept) + " slots for " + std::to_string(s.kv_heads) +
           " KV heads";
  }
  if (call.probe_tokens < 1)
    return "probe_tokens must be at least 1, got " + std::to_string(call.probe_tokens);
  if (call.window < 0) return "window must not be negative, got " + std::to_string(call.window);
  if (!(call.softcap >= 0.0f) || std::isinf(call.softcap)) {
    return "softcap must be finite and not negative, got " + std::to_string(call.softcap);
  }
  const std::string problem = check_storage(call.keys.storage, s.key_dim, call.group);
  return problem.empty() ? check_storage(call.values.storage, s.value_dim, call.group) : problem;
}

std::string check_entries(const AttentionCall& call, const std::int32_t* map, std::int64_t b) {
  const AttentionShape& s = call.shape;
  for (std::int64_t h = 0; h < s.heads; ++h) {
    if (map[h] < 0 || map[h] >= s.heads) {
      return row_name(b) + "head map entry " + std::to_string(h) + " is " + std::to_string(map[h]) +
             ", must be between 0 and " + std::to_string(s.heads - 1);
    }
  }
  return "";
}

// The map that names the kept KV heads: they have slots.
std::string check_kept(const AttentionCall& call, std::int64_t b) {
  const AttentionShape& s = call.shape;
  const std::int32_t* map = call.kept_map(b);
  const std::string problem = check_entries(call, map, b);
  if (!problem.empty()) return problem;
  const std::int64_t used = assign_slots(map, s.heads, s.kv_heads).used;
  if (used > s.kept) {
    return row_name(b) + "the head map keeps " + std::to_string(used) + " KV heads, the K cache has " +
           std::to_string(s.kept) + " slots";
  }
  return "";
}

// The shared op's own map: it names none but the producer's kept KV heads.
std::string check_shared_map(const AttentionCall& call, std::int64_t b) {
  const AttentionShape& s = call.shape;
  const std::int32_t* map = call.past_head_map + b * s.heads;
  const std::string problem = check_entries(call, map, b);
  if (!problem.empty()) return problem;
  const Slots kept = assign_slots(call.kept_map(b), s.heads, s.kv_heads);
  for (std::int64_t h = 0; h < s.heads; ++h) {
    const std::int64_t kv_head = map[h] / (s.heads / s.kv_heads);
    if (kept.of_kv_head[kv_head] < 0) {
      return row_name(b) + "the head map names KV head " + std::to_string(kv_head) +
             ", which the producer did not keep";
    }
  }
  return "";
}

std::string check_row(const AttentionCall& call, std::int64_t b) {
  const AttentionShape& s = call.shape;
  const std::int64_t past = call.past_lengths[b];
  const std::int64_t new_tokens = call.lengths[b];
  if (new_tokens < 0 || new_tokens > s.tokens) {
    return row_name(b) + "lengths is " + std::to_string(new_tokens) + ", must be between 0 and " +
           std::to_string(s.tokens);
  }
  if (past < 0) return row_name(b) + "past_lengths is " + std::to_string(past) + ", must not be negative";
  if (new_tokens == 0) return "";
  if (past + new_tokens > s.capacity()) {
    return row_name(b) + std::to_string(past) + " cached and " + std::to_string(new_tokens) +
           " new tokens exceed the capacity " + std::to_string(s.capacity());
  }
  const bool fresh = call.online && past == 0;
  if (!call.shared()) return fresh ? "" : check_kept(call, b);
  const std::string problem = check_kept(call, b);
  return fresh || !problem.empty() ? problem : check_shared_map(call, b);
}

// Each row has the pages it needs, and writes to none but its own.
std::string check_pages(const AttentionCall& call) {
  const AttentionShape& s = call.shape;
  std::vector<std::int32_t> uses(s.pages, 0);
  const auto for_each_entry = [&](bool only_written, const auto& body) -> std::string {
    for (std::int64_t b = 0; b < s.batch; ++b) {
      if (call.lengths[b] == 0) continue;
      const std::int64_t past = call.past_lengths[b], end = past + call.lengths[b];
      const std::int64_t begin = only_written ? past : call.first_visible(past);
      for (std::int64_t entry = begin / s.page_size; entry * s.page_size < end; ++entry) {
        const std::string problem = body(b, entry, call.page_table[b * s.entries + entry]);
        if (!problem.empty()) return row_name(b) + problem;
      }
    }
    return "";
  };
  const std::string problem =
      for_each_entry(false, [&](std::int64_t, std::int64_t entry, std::int32_t page) -> std::string {
        if (page < 0 || page >= s.pages) {
          return "page_table entry " + std::to_string(entry) + " is " + std::to_string(page) +
                 ", the pool has " + std::to_string(s.pages) + " pages";
        }
        ++uses[page];
        return "";
      });
  if (!problem.empty()) return problem;
  return for_each_entry(true, [&](std::int64_t, std::int64_t, std::int32_t page) -> std::string {
    if (uses[page] == 1) return "";
    return "page " + std::to_string(page) + " is written to and stands in this call twice";
  });
}

}  // namespace

std::string check(const AttentionCall& call) {
  std::string problem = check_shape(call);
  for (std::int64_t b = 0; problem.empty() && b < call.shape.batch; ++b) problem = check_row(call, b);
  return problem.empty() ? check_pages(call) : problem;
}

}  // namespace chai
