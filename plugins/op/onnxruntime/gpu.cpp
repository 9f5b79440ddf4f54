// What a program asks about the GPU before it opens a session on it, and the copies that ONNX Runtime has no
// call for. Each returns nullptr, or what is wrong, which holds until the thread's next call.
#include <cstddef>
#include <string>

#ifdef CHAI_WITH_CUDA
#include <stdexcept>

#include "op/cuda/cuda_error.h"
#include "op/cuda/cuda_kernels.h"

namespace {

template <typename Body>
const char* problem_of(const Body& body) {
  thread_local std::string problem;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

}  // namespace

// Compute capability (90 for 9.0) and bytes of memory of the current GPU.
extern "C" __attribute__((visibility("default"))) const char* chai_gpu(int* architecture, std::size_t* free,
                                                                       std::size_t* total) {
  return problem_of([&] {
    *architecture = static_cast<int>(chai::cuda::current_architecture());
    chai::cuda::require(cudaMemGetInfo(free, total), "asking for free GPU memory");
  });
}

// Copies on the GPU, and waits for the end.
extern "C" __attribute__((visibility("default"))) const char* chai_gpu_copy(void* target, const void* source,
                                                                            std::size_t bytes) {
  return problem_of([&] {
    chai::cuda::require(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, nullptr), "copying");
    chai::cuda::require(cudaStreamSynchronize(nullptr), "copying");
  });
}

#else

namespace {

constexpr const char* kWithout =
    "the library was compiled without a CUDA toolkit; set CUDAToolkit_ROOT and compile it again";

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* chai_gpu(int*, std::size_t*, std::size_t*) {
  return kWithout;
}

extern "C" __attribute__((visibility("default"))) const char* chai_gpu_copy(void*, const void*, std::size_t) {
  return kWithout;
}

#endif
