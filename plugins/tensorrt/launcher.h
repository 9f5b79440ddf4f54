// What the plugin asks of a GPU. The tests put a recorder in its place.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace chai::tensorrt {

struct LaunchSize {
  std::array<std::uint32_t, 3> grid{};
  std::uint32_t threads = 0;
  std::uint32_t shared_bytes = 0;
};

class Launcher {
 public:
  virtual ~Launcher() = default;

  // Both only put work on the stream, and throw std::runtime_error when that is refused.
  // `arguments` points to the kernel's arguments, one pointer each; they are copied before the call returns.
  virtual void launch(std::size_t kernel, const LaunchSize& size, void** arguments, cudaStream_t stream) = 0;
  virtual void copy(void* target, const void* source, std::size_t bytes, cudaStream_t stream) = 0;
};

}  // namespace chai::tensorrt
