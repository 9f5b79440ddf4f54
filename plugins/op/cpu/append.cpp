#include "op/cpu/append.h"

#include <algorithm>
#include <cstring>

namespace chai {
namespace {

constexpr std::int64_t kCopyBytes = std::int64_t{1} << 20;

struct Copy {
  const char* from;
  char* to;
  std::size_t bytes;
};

void add_copies(const void* from, void* to, std::int64_t bytes, std::vector<Copy>* copies) {
  if (from == to) return;
  for (std::int64_t at = 0; at < bytes; at += kCopyBytes) {
    copies->push_back({static_cast<const char*>(from) + at, static_cast<char*>(to) + at,
                       static_cast<std::size_t>(std::min(kCopyBytes, bytes - at))});
  }
}

void copy_pools(const AttentionCall& call, const Executor& executor) {
  const AttentionShape& s = call.shape;
  std::vector<Copy> copies;
  const auto add = [&](const Pool& pool, std::int64_t heads, std::int64_t dim) {
    const std::int64_t rows = s.pages * heads * s.page_size;
    add_copies(pool.past, pool.present, rows * row_bytes(pool.storage, dim), &copies);
    add_copies(pool.past_scales, pool.present_scales, rows * 2 * row_scales(pool.storage, dim, call.group),
               &copies);
  };
  add(call.keys, s.kept, s.key_dim);
  add(call.values, s.kv_heads, s.value_dim);
  for_each(executor, copies.size(), true,
           [&](std::size_t i) { std::memcpy(copies[i].to, copies[i].from, copies[i].bytes); });
}

}  // namespace

void append(const AttentionCall& call, const Kernels& kernel, const Executor& executor,
            const std::vector<Row>& rows) {
  copy_pools(call, executor);
  const AttentionShape& s = call.shape;
  std::vector<AppendTask> tasks;
  std::size_t bytes = 0;
  const auto add = [&](const Row& row, const void* tensor, std::int64_t kv_head, const Pool& pool,
                       std::int64_t tokens, std::int64_t dim, const PagedRows& to) {
    AppendTask task{};
    task.element = kernel.element(call.storage);
    task.rows = kernel.rows(pool.storage);
    task.from = activations(call, tensor, row.index * s.kv_heads + kv_head, tokens, dim);
    task.to = to;
    task.position = row.past;
    task.count = row.new_tokens;
    task.dim = dim;
    task.group = call.group;
    bytes += row.new_tokens * row_bytes(call.storage, dim);
    tasks.push_back(task);
  };
  for (const Row& row : rows) {
    for (std::int64_t g = 0; g < s.kv_heads; ++g) {
      if (row.slots.of_kv_head[g] >= 0) {
        add(row, call.key, g, call.keys, s.tokens, s.key_dim, keys_of(call, row, g));
      }
      add(row, call.value, g, call.values, s.tokens, s.value_dim, values_of(call, row, g));
    }
  }
  for_each(executor, tasks.size(), bytes > kInlineBytes,
           [&](std::size_t i) { kernel.append(tasks[i], scratch(kernel.append_scratch(tasks[i]))); });
}

}  // namespace chai
