// What the op asks of a GPU. The tests put a recorder in its place.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace chai::cuda {

using Stream = CUstream_st*;  // cudaStream_t, without the toolkit

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
  virtual void launch(std::size_t kernel, const LaunchSize& size, void** arguments, Stream stream) = 0;
  virtual void copy(void* target, const void* source, std::size_t bytes, Stream stream) = 0;
};

}  // namespace chai::cuda
