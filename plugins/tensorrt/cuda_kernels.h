// Cubins loaded with the CUDA runtime, and their launches.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "kernel_image.h"
#include "launcher.h"
#include "program.h"

namespace chai::tensorrt {

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

  void launch(std::size_t kernel, const LaunchSize& size, void** arguments, cudaStream_t stream) override;
  void copy(void* target, const void* source, std::size_t bytes, cudaStream_t stream) override;

 private:
  void load(const KernelImage& image);
  void unload();

  Program program_;
  std::vector<cudaLibrary_t> libraries_;
  std::vector<cudaKernel_t> kernels_;  // parallel to program_.kernels()
};

// The kernels of an image, loaded once per process: every layer and engine that carries equal kernels shares
// them through TensorRT's plugin registry. Ready for the current device.
std::shared_ptr<Launcher> acquire_kernels(const std::shared_ptr<const KernelImage>& image);

}  // namespace chai::tensorrt
