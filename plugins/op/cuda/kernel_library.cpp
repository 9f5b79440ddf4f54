#include "op/cuda/kernel_library.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <stdexcept>

#include "op/cuda/cuda_error.h"
#include "op/cuda/cuda_kernels.h"
#include "op/cuda/kernel_image.h"

namespace chai::cuda {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> names_in(const fs::path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory, error)) {
    if (entry.is_directory()) names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

// A pool of its own, which keeps what it has from step to step: the default one gives it back to the system
// whenever the host waits.
struct KernelLibrary::Device {
  explicit Device(int number) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = number;
    require(cudaMemPoolCreate(&pool, &properties), "making a memory pool");
    std::uint64_t kept = std::numeric_limits<std::uint64_t>::max();
    const cudaError_t status = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept);
    if (status != cudaSuccess) static_cast<void>(cudaMemPoolDestroy(pool));
    require(status, "setting up a memory pool");
  }
  ~Device() { static_cast<void>(cudaMemPoolDestroy(pool)); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  cudaMemPool_t pool = nullptr;
  std::vector<LoadedKernels> kernels;
};

KernelLibrary::KernelLibrary(std::string directory) : directory_(std::move(directory)) {}

KernelLibrary::~KernelLibrary() = default;

KernelLibrary::Device& KernelLibrary::device() {
  int number = 0;
  require(cudaGetDevice(&number), "asking for the current GPU");
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<Device>& found = devices_[number];
  if (found == nullptr) {
    auto made = std::make_unique<Device>(number);
    made->kernels = load();
    found = std::move(made);
  }
  return *found;
}

std::vector<LoadedKernels> KernelLibrary::load() const {
  const std::string target = "sm_" + std::to_string(current_architecture());
  const fs::path directory = fs::path(directory_) / target;
  std::vector<LoadedKernels> kernels;
  for (const std::string& form : names_in(directory)) {
    const auto image = KernelImage::from_directory((directory / form).string());
    auto loaded = std::make_shared<CudaKernels>(*image);
    loaded->prepare_device();
    kernels.push_back({Program::parse(image->file(kIndexFile)), loaded});
  }
  if (!kernels.empty()) return kernels;
  std::string others;
  for (const std::string& name : names_in(directory_)) others += (others.empty() ? "" : ", ") + name;
  throw std::runtime_error("this GPU is " + target + " and " + directory_ + " has kernels for " +
                           (others.empty() ? "none" : others) +
                           "; run `chai-export build --backend onnxruntime --gpu " + target + "`");
}

const std::vector<LoadedKernels>& KernelLibrary::here() {
  return device().kernels;
}

void* KernelLibrary::take(std::size_t bytes, Stream stream) {
  void* memory = nullptr;
  require(cudaMallocFromPoolAsync(&memory, bytes, device().pool, stream),
          "allocating " + std::to_string(bytes) + " bytes for attention");
  return memory;
}

void KernelLibrary::give(void* memory, Stream stream) noexcept {
  static_cast<void>(cudaFreeAsync(memory, stream));
}

}  // namespace chai::cuda
