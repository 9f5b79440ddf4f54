#include "op/cuda/cuda_kernels.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

#include "op/cuda/cuda_error.h"

namespace chai::cuda {
namespace {

// More shared memory than this must be asked for.
constexpr std::uint32_t kSharedWithoutAsking = 48 * 1024;

const void* handle(cudaKernel_t kernel) {
  return reinterpret_cast<const void*>(kernel);
}

// A cubin where the driver can read its ELF structures; in the image it starts anywhere. The driver makes a
// copy.
class AlignedCopy {
 public:
  explicit AlignedCopy(std::string_view content) {
    constexpr std::size_t kAlignment = 64;
    const std::size_t size = (content.size() + 1 + kAlignment - 1) / kAlignment * kAlignment;
    copy_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, size)));
    if (copy_ == nullptr) throw std::bad_alloc();
    std::memcpy(copy_.get(), content.data(), content.size());
    copy_.get()[content.size()] = '\0';  // for code as text (PTX)
  }
  const void* get() const { return copy_.get(); }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> copy_;
};

}  // namespace

std::int64_t current_architecture() {
  int device = 0;
  int major = 0;
  int minor = 0;
  require(cudaGetDevice(&device), "asking for the current GPU");
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "asking for the architecture");
  require(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
          "asking for the architecture");
  return 10 * std::int64_t{major} + minor;
}

CudaKernels::CudaKernels(const KernelImage& image) : program_(Program::parse(image.file(kIndexFile))) {
  try {
    load(image);
  } catch (...) {
    unload();
    throw;
  }
}

CudaKernels::~CudaKernels() {
  unload();
}

void CudaKernels::load(const KernelImage& image) {
  std::map<std::string, cudaLibrary_t> loaded;
  for (const Kernel& kernel : program_.kernels()) {
    if (loaded.count(kernel.file) == 0) {
      cudaLibrary_t library = nullptr;
      const AlignedCopy code(image.file(kernel.file));
      require(cudaLibraryLoadData(&library, code.get(), nullptr, nullptr, 0, nullptr, nullptr, 0),
              "loading " + kernel.file);
      libraries_.push_back(library);
      loaded[kernel.file] = library;
    }
    cudaKernel_t found = nullptr;
    require(cudaLibraryGetKernel(&found, loaded[kernel.file], kernel.symbol.c_str()),
            "finding " + kernel.symbol);
    kernels_.push_back(found);
  }
}

void CudaKernels::unload() {
  // Failing here means the process is ending and the driver is gone already.
  for (cudaLibrary_t library : libraries_) static_cast<void>(cudaLibraryUnload(library));
  libraries_.clear();
}

void CudaKernels::prepare_device() {
  const std::int64_t here = current_architecture();
  if (here != program_.spec().architecture) {
    throw std::runtime_error("the kernels are for sm_" + std::to_string(program_.spec().architecture) +
                             " and this GPU is sm_" + std::to_string(here) +
                             "; run `chai-export build --backend tensorrt` on such a GPU");
  }
  for (std::size_t i = 0; i < kernels_.size(); ++i) {
    const Kernel& kernel = program_.kernels()[i];
    cudaFuncAttributes attributes{};
    require(cudaFuncGetAttributes(&attributes, handle(kernels_[i])),
            "loading " + kernel.symbol + " onto the GPU");
    if (kernel.shared_bytes > kSharedWithoutAsking) {
      require(cudaFuncSetAttribute(handle(kernels_[i]), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(kernel.shared_bytes)),
              "asking for " + std::to_string(kernel.shared_bytes) + " bytes of shared memory for " +
                  kernel.symbol);
    }
  }
}

void CudaKernels::launch(std::size_t kernel, const LaunchSize& size, void** arguments, Stream stream) {
  const dim3 grid(size.grid[0], size.grid[1], size.grid[2]);
  require(cudaLaunchKernel(handle(kernels_.at(kernel)), grid, dim3(size.threads), arguments,
                           size.shared_bytes, stream),
          "launching " + program_.kernels()[kernel].symbol);
}

void CudaKernels::copy(void* target, const void* source, std::size_t bytes, Stream stream) {
  require(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, stream), "copying a cache");
}

}  // namespace chai::cuda
