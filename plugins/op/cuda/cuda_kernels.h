// Cubins loaded with the CUDA runtime, and their launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "op/cuda/kernel_image.h"
#include "op/cuda/launcher.h"
#include "op/cuda/program.h"

namespace chai::cuda {

// Compute capability of the current GPU, 90 for 9.0. Throws std::runtime_error without a GPU or driver.
std::int64_t current_architecture();

class CudaKernels : public Launcher {
 public:
  // Loads every kernel of the image. Throws std::runtime_error, without a driver for instance.
  explicit CudaKernels(const KernelImage& image);
  ~CudaKernels() override;
  CudaKernels(const CudaKernels&) = delete;
  CudaKernels& operator=(const CudaKernels&) = delete;

  // Brings the kernels onto the current device and asks for their shared memory, so that neither happens in
  // a graph capture. Throws when the kernels are for another architecture.
  void prepare_device();

  void launch(std::size_t kernel, const LaunchSize& size, void** arguments, Stream stream) override;
  void copy(void* target, const void* source, std::size_t bytes, Stream stream) override;

 private:
  void load(const KernelImage& image);
  void unload();

  Program program_;
  std::vector<cudaLibrary_t> libraries_;
  std::vector<cudaKernel_t> kernels_;  // parallel to program_.kernels()
};

}  // namespace chai::cuda
