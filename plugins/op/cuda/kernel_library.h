// Kernels for several architectures in one directory, of which a GPU gets its own, and the memory they use.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "op/cuda/launcher.h"
#include "op/cuda/program.h"

namespace chai::cuda {

// The kernels of one form, ready to be launched on one GPU.
struct LoadedKernels {
  Program program;
  std::shared_ptr<Launcher> launcher;
};

// What a runtime's op asks for kernels. The tests put a player in its place.
class KernelSource {
 public:
  virtual ~KernelSource() = default;

  // Every form there is for the current GPU; the same vector for each call on it.
  virtual const std::vector<LoadedKernels>& here() = 0;
  // Memory of the current GPU from now on in the stream's order, and back.
  virtual void* take(std::size_t bytes, Stream stream) = 0;
  virtual void give(void* memory, Stream stream) noexcept = 0;
  // For messages.
  virtual const std::string& directory() const = 0;
};

// `directory` holds sm_90/NAME/index.json and cubins for each architecture and form. Nothing is loaded, and
// no driver is needed, before here(). All throw std::runtime_error.
class KernelLibrary final : public KernelSource {
 public:
  explicit KernelLibrary(std::string directory);
  ~KernelLibrary() override;
  KernelLibrary(const KernelLibrary&) = delete;
  KernelLibrary& operator=(const KernelLibrary&) = delete;

  const std::vector<LoadedKernels>& here() override;
  void* take(std::size_t bytes, Stream stream) override;
  void give(void* memory, Stream stream) noexcept override;
  const std::string& directory() const override { return directory_; }

 private:
  struct Device;

  Device& device();
  std::vector<LoadedKernels> load() const;

  std::string directory_;
  std::mutex mutex_;
  std::map<int, std::unique_ptr<Device>> devices_;
};

}  // namespace chai::cuda
