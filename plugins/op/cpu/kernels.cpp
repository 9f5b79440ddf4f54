// Compiled once per instruction set, with CHAI_ISA naming the namespace and the compiler's flags choosing the
// width of a vector (vector.h).
#include "op/cpu/kernels.h"

#include "op/cpu/probe_kernel.h"
#include "op/cpu/row_kernels.h"
#include "op/cpu/stream_kernel.h"
#include "op/cpu/tile_kernel.h"

namespace chai {
namespace CHAI_ISA {
namespace {

template <typename T>
constexpr ElementKernels make_element() {
  return {sizeof(T),
          [](float* to, const void* from, std::int64_t n, float factor) {
            widen(to, static_cast<const T*>(from), n, factor);
          },
          [](void* to, const float* from, std::int64_t n, float factor) {
            narrow(static_cast<T*>(to), from, n, factor);
          }};
}

constexpr ElementKernels kFloat32 = make_element<float>();
constexpr ElementKernels kFloat16 = make_element<Float16>();
constexpr ElementKernels kBfloat16 = make_element<Bfloat16>();

const ElementKernels* element(Storage storage) {
  switch (storage) {
    case Storage::kFloat16:
      return &kFloat16;
    case Storage::kBfloat16:
      return &kBfloat16;
    default:
      return &kFloat32;
  }
}

const RowKernels* rows(Storage storage) {
  switch (storage) {
    case Storage::kFloat16:
      return &kFloat16Rows;
    case Storage::kBfloat16:
      return &kBfloat16Rows;
    case Storage::kInt8:
      return &kInt8Rows;
    case Storage::kInt4:
      return &kInt4Rows;
    default:
      return &kFloat32Rows;
  }
}

// A few rows at a time: what is on its way stays in L1.
constexpr std::int64_t kAppendRows = 16;

void append(const AppendTask& task, float* floats) {
  const std::int64_t end = task.position + task.count;
  const auto* from = static_cast<const char*>(task.from);
  for_each_block(task.to, task.position, end, [&](const RowBlock& page, std::int64_t) {
    for (std::int64_t t = 0; t < page.count; t += kAppendRows) {
      RowBlock block{page.rows + t * task.to.row_bytes, nullptr, least(kAppendRows, page.count - t)};
      if (page.scales != nullptr) block.scales = page.scales + t * task.to.row_scales;
      task.element->widen(floats, from, block.count * task.dim, 1.0f);
      task.rows->store(block, floats, task.dim, task.group);
      from += block.count * task.dim * task.element->size;
    }
  });
}

std::size_t append_scratch(const AppendTask& task) {
  return kAppendRows * task.dim;
}

void merge(const MergeTask& task, float* sums) {
  const Common& common = *task.common;
  for (std::int64_t token = 0; token < task.tokens; ++token) {
    SoftmaxState merged;
    for (std::int64_t p = 0; p < task.parts; ++p) merged.merge(task.target.state[p * task.tokens + token]);
    merged.include(task.target.sink);
    __builtin_memset(sums, 0, common.value_dim * sizeof(float));
    for (std::int64_t p = 0; p < task.parts; ++p) {
      const std::int64_t entry = p * task.tokens + token;
      if (task.target.state[entry].empty()) continue;  // nobody has written its sums
      const float weight = merged.weight_of(task.target.state[entry]);
      add_rows<1>(sums, task.target.partial + entry * common.value_dim, &weight, common.value_dim);
    }
    auto* to = static_cast<char*>(task.target.output) + token * common.output_stride * common.element->size;
    common.element->narrow(to, sums, common.value_dim, 1.0f);
  }
}

std::size_t merge_scratch(const MergeTask& task) {
  return task.common->value_dim;
}

}  // namespace

extern const Kernels kKernels;  // a test compiles this file for an instruction set that no header names
const Kernels kKernels = {probe, ProbeScratch::size, append, append_scratch, stream,  StreamScratch::size,
                          tile,  TileScratch::size,  merge,  merge_scratch,  element, rows};

}  // namespace CHAI_ISA
}  // namespace chai
