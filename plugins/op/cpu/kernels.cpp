// Compiled once per instruction set, with CHAI_ISA naming the namespace and the compiler's flags choosing the
// width of a vector (vector.h).
#include "kernels.h"

#include "probe_kernel.h"
#include "stream_kernel.h"
#include "tile_kernel.h"

namespace chai {
namespace CHAI_ISA {
namespace {

template <typename T>
void merge(const MergeTask& task, float* sums) {
  for (std::int64_t token = 0; token < task.tokens; ++token) {
    const std::int64_t parts = (task.position + token) / task.part_length + 1;
    SoftmaxState merged;
    for (std::int64_t p = 0; p < parts; ++p) merged.merge(task.target.state[p * task.tokens + token]);
    __builtin_memset(sums, 0, task.value_dim * sizeof(float));
    for (std::int64_t p = 0; p < parts; ++p) {
      const std::int64_t entry = p * task.tokens + token;
      const float weight = merged.weight_of(task.target.state[entry]);
      add_rows<1>(sums, task.target.partial + entry * task.value_dim, &weight, task.value_dim);
    }
    narrow(static_cast<T*>(task.target.output) + token * task.output_stride, sums, task.value_dim, 1.0f);
  }
}

std::size_t merge_scratch(const MergeTask& task) {
  return task.value_dim;
}

template <typename T>
constexpr Kernels make() {
  return {probe<T>, probe_scratch,     stream<T>, StreamScratch::size,
          tile<T>,  TileScratch::size, merge<T>,  merge_scratch};
}

constexpr Kernels kFloat32 = make<float>();
constexpr Kernels kFloat16 = make<Float16>();
constexpr Kernels kBfloat16 = make<Bfloat16>();

}  // namespace

const Kernels& kernels(Storage storage) {
  switch (storage) {
    case Storage::kFloat16:
      return kFloat16;
    case Storage::kBfloat16:
      return kBfloat16;
    default:
      return kFloat32;
  }
}

}  // namespace CHAI_ISA
}  // namespace chai
