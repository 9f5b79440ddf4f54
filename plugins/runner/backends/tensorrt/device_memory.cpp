#include "runner/backends/tensorrt/device_memory.h"

#include <cuda_runtime_api.h>

#include <utility>

#include "op/cuda/cuda_error.h"

namespace chai {

using cuda::require;

DeviceMemory::DeviceMemory(std::size_t bytes) : bytes_(bytes) {
  void* data = nullptr;
  require(cudaMalloc(&data, bytes), "allocating GPU memory");
  data_ = static_cast<char*>(data);
}

DeviceMemory::~DeviceMemory() {
  cudaFree(data_);
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

PinnedMemory::~PinnedMemory() {
  cudaFreeHost(data_);
}

char* PinnedMemory::at_least(std::size_t bytes) {
  if (bytes > bytes_) {
    cudaFreeHost(std::exchange(data_, nullptr));
    bytes_ = 0;
    void* data = nullptr;
    require(cudaMallocHost(&data, bytes), "allocating pinned memory");
    data_ = static_cast<char*>(data);
    bytes_ = bytes;
  }
  return data_;
}

}  // namespace chai
