// What the stages of a call run on: tasks in parallel, and memory for each of them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "chai/attention.h"

namespace chai {

// Below this much work a stage runs on the calling thread: waking another costs more.
constexpr std::size_t kInlineBytes = std::size_t{1} << 18;

// Memory of one thread for one task at a time; it grows to the largest need and is kept.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  float* floats(std::size_t count) {
    if (count > size_) {
      const std::size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
      void* larger = std::aligned_alloc(64, bytes);
      if (larger == nullptr) throw std::bad_alloc();
      std::free(memory_);
      memory_ = static_cast<float*>(larger);
      size_ = bytes / sizeof(float);
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  std::size_t size_ = 0;
};

inline float* scratch(std::size_t floats) {
  thread_local Scratch memory;
  return memory.floats(floats);
}

// Runs body(i) for each i. An exception in a task reaches the caller, never the thread pool.
template <typename Body>
void for_each(const Executor& executor, std::size_t count, bool parallel, const Body& body) {
  if (!parallel || count < 2) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Shared {
    const Body& body;
    std::atomic<bool> failed{false};
  } shared{body};
  executor.run(
      executor.context, count,
      [](void* data, std::size_t i) {
        Shared& s = *static_cast<Shared*>(data);
        try {
          s.body(i);
        } catch (...) {
          s.failed = true;
        }
      },
      &shared);
  if (shared.failed) throw std::bad_alloc();  // allocation is all that can fail in a task
}

}  // namespace chai
