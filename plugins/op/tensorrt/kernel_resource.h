// Kernels shared through TensorRT's plugin registry.
#pragma once

#include <memory>

#include "op/cuda/kernel_image.h"
#include "op/cuda/launcher.h"

namespace chai::tensorrt {

// The kernels of an image, loaded once per process: every layer and engine that carries equal kernels shares
// them. Ready for the current device. Throws std::runtime_error.
std::shared_ptr<cuda::Launcher> acquire_kernels(const std::shared_ptr<const cuda::KernelImage>& image);

}  // namespace chai::tensorrt
