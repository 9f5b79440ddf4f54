// Memory for caches: how much there is, how much of it they may take, and memory that takes none before it is
// written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace chai {

// Bytes that can be had without swapping.
std::int64_t available_memory();

// A byte count with a binary unit: 1536 is "1.5 KiB".
std::string bytes_text(std::int64_t count);

// Bytes that caches may take, and what a caller can do if they are too few.
struct Budget {
  std::int64_t size = 0;
  std::string fix;
};

// `limit`, Options::cache_memory, or most of what is available where that is less; 0 is no limit. `memory` is
// what a caller calls it.
Budget budget_of(std::int64_t limit, std::int64_t available, const std::string& memory = "memory");

// Addresses that the system gives memory to, a little at a time, when something is written there. So a pool
// can be as large as its rows can ever need, and growing is writing further.
class ReservedMemory {
 public:
  ReservedMemory() = default;
  // Throws std::runtime_error if there are no addresses for it.
  explicit ReservedMemory(std::size_t bytes);
  ~ReservedMemory();
  ReservedMemory(ReservedMemory&& other) noexcept;
  ReservedMemory& operator=(ReservedMemory&& other) noexcept;

  char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace chai
