#include "runner/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <utility>

namespace chai {
namespace {

// Of the memory that is available, for caches; the rest is for activations and other programs.
constexpr double kShare = 0.9;
// Of the machine's large pages.
constexpr std::uintptr_t kLargePage = std::uintptr_t{2} << 20;

// Rows in pages of the cache lie all over it, and each page of the machine that they lie in costs a look into
// its tables: with large ones codes are read a fifth faster. The beginning stays in small ones, so that a
// short text takes no more than it needs. Only advice: where it is not taken nothing changes.
void advise_large_pages(char* data, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t skipped = (address / kLargePage + 2) * kLargePage - address;
  if (skipped < bytes) madvise(data + skipped, bytes - skipped, MADV_HUGEPAGE);
}

}  // namespace

std::int64_t available_memory() {
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    long long kibibytes = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %lld kB", &kibibytes) == 1) return kibibytes * 1024;
  }
  return static_cast<std::int64_t>(sysconf(_SC_AVPHYS_PAGES)) * sysconf(_SC_PAGESIZE);
}

std::string bytes_text(std::int64_t count) {
  if (count < 1024) return std::to_string(count) + " B";
  double value = static_cast<double>(count);
  const char* unit = "";
  for (const char* next : {"KiB", "MiB", "GiB", "TiB"}) {
    if (value < 1024) break;
    value /= 1024;
    unit = next;
  }
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f %s", value, unit);
  return text;
}

Budget budget_of(std::int64_t limit, std::int64_t available, const std::string& memory) {
  const auto most = static_cast<std::int64_t>(static_cast<double>(available) * kShare);
  if (limit > 0 && limit <= most) return {limit, "raise cache_memory (" + bytes_text(limit) + ")"};
  return {most, "free " + memory + " (" + bytes_text(available) + " are free)"};
}

ReservedMemory::ReservedMemory(std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* data =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED)
    // A limit on addresses, or a system that promises no more than it has.
    throw std::runtime_error("the system does not reserve " + bytes_text(static_cast<std::int64_t>(bytes)) +
                             " for a KV cache; lower cache_memory, max_seq or max_new_tokens, or raise its "
                             "limit (ulimit -v)");
  data_ = static_cast<char*>(data);
  advise_large_pages(data_, bytes_);
}

ReservedMemory::~ReservedMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

ReservedMemory::ReservedMemory(ReservedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

ReservedMemory& ReservedMemory::operator=(ReservedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace chai
