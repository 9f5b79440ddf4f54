// Memory of the GPU, and memory of the host that copies to and from it read without a detour.
#pragma once

#include <cstddef>

namespace chai {

class DeviceMemory {
 public:
  DeviceMemory() = default;
  // Throws std::runtime_error if there is not enough.
  explicit DeviceMemory(std::size_t bytes);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;

  char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  ~PinnedMemory();

  // At least so many bytes; what was there is lost when that is more than there were. Throws
  // std::runtime_error if there is not enough.
  char* at_least(std::size_t bytes);
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace chai
