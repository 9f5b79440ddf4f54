#include "op/cpu/call_rows.h"

#include <algorithm>
#include <cmath>

#include "support/half.h"

namespace chai {

std::vector<Row> active_rows(const AttentionCall& call) {
  const AttentionShape& s = call.shape;
  std::vector<Row> rows;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    if (call.lengths[b] == 0) continue;
    Row row;
    row.index = b;
    row.past = call.past_lengths[b];
    row.new_tokens = call.lengths[b];
    row.fresh = call.online && row.past == 0;
    row.exact = row.fresh ? std::min(call.probe_tokens, row.new_tokens) : 0;
    const std::int32_t* map = call.past_head_map + b * s.heads;
    row.head_map.assign(map, map + s.heads);
    rows.push_back(std::move(row));
  }
  return rows;
}

PagedRows paged_rows(const AttentionCall& call, const Pool& pool, std::int64_t heads, std::int64_t dim,
                     std::int64_t head, std::int64_t row) {
  PagedRows rows{};
  rows.table = call.page_table + row * call.shape.entries;
  rows.page_size = call.shape.page_size;
  rows.row_bytes = row_bytes(pool.storage, dim);
  rows.row_scales = row_scales(pool.storage, dim, call.group);
  rows.page_bytes = heads * rows.page_size * rows.row_bytes;
  rows.page_scales = heads * rows.page_size * rows.row_scales;
  rows.rows = static_cast<char*>(pool.present) + head * rows.page_size * rows.row_bytes;
  if (rows.row_scales > 0) {
    rows.scales = static_cast<std::uint16_t*>(pool.present_scales) + head * rows.page_size * rows.row_scales;
  }
  return rows;
}

PagedRows keys_of(const AttentionCall& call, const Row& row, std::int64_t kv_head) {
  return paged_rows(call, call.keys, call.shape.kept, call.shape.key_dim, row.slots.of_kv_head[kv_head],
                    row.index);
}

PagedRows values_of(const AttentionCall& call, const Row& row, std::int64_t kv_head) {
  return paged_rows(call, call.values, call.shape.kv_heads, call.shape.value_dim, kv_head, row.index);
}

const char* activations(const AttentionCall& call, const void* tensor, std::int64_t index,
                        std::int64_t tokens, std::int64_t dim) {
  return static_cast<const char*>(tensor) + index * tokens * row_bytes(call.storage, dim);
}

float score_scale(const AttentionCall& call) {
  return call.scale != 0.0f ? call.scale : 1.0f / std::sqrt(static_cast<float>(call.shape.key_dim));
}

float sink_of(const AttentionCall& call, std::int64_t head) {
  if (call.sinks == nullptr) return -HUGE_VALF;
  const auto* halves = static_cast<const std::uint16_t*>(call.sinks);
  switch (call.storage) {
    case Storage::kFloat16:
      return half_to_float(halves[head]);
    case Storage::kBfloat16:
      return bfloat16_to_float(halves[head]);
    default:
      return static_cast<const float*>(call.sinks)[head];
  }
}

}  // namespace chai
