// Stand-ins for kernels and the GPU that runs them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "op/cuda/launcher.h"

namespace chai::cuda::test {

// Remembers what it is asked for.
class RecordingLauncher final : public Launcher {
 public:
  struct Launch {
    std::size_t kernel;
    LaunchSize size;
    std::vector<std::uint64_t> arguments;  // the 8 bytes at each argument's place
  };
  struct Copy {
    void* target;
    const void* source;
    std::size_t bytes;
  };

  // Kernels with this many arguments; the index says so, a launch does not.
  explicit RecordingLauncher(std::vector<std::size_t> argument_counts)
      : argument_counts_(std::move(argument_counts)) {}
  void launch(std::size_t kernel, const LaunchSize& size, void** arguments, Stream stream) override;
  void copy(void* target, const void* source, std::size_t bytes, Stream stream) override;

  std::vector<Launch> launches;
  std::vector<Copy> copies;
  bool refuses = false;

 private:
  std::vector<std::size_t> argument_counts_;
};

// Two kernels for H=4, G=2, D=16, Dv=8, P=5, float16: one for S > 1, one for S = 1.
extern const char* const kIndex;
inline const std::vector<std::size_t> kArgumentCounts = {6, 4};

// A directory of kernels, removed with the object.
class KernelDirectory {
 public:
  explicit KernelDirectory(const std::string& index = kIndex);
  ~KernelDirectory();
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }
  void write(const std::string& name, const std::string& content) const;

 private:
  std::string path_;
};

// A few ways to damage an index, each with what to replace by what.
extern const std::vector<std::pair<std::string, std::string>> kIndexDamages;

}  // namespace chai::cuda::test
