#include "op/tensorrt/kernel_resource.h"

#include <NvInferRuntime.h>

#include <stdexcept>
#include <string>

#include "op/cuda/cuda_kernels.h"
#include "op/tensorrt/log.h"
#include "op/tensorrt/runtime_library.h"

namespace chai::tensorrt {
namespace {

// What the registry holds. It keeps a clone of what it is shown, so only the clone loads.
class KernelResource : public nvinfer1::IPluginResource {
 public:
  explicit KernelResource(std::shared_ptr<const cuda::KernelImage> image) : image_(std::move(image)) {}

  nvinfer1::IPluginResource* clone() noexcept override {
    return guarded<nvinfer1::IPluginResource*>("loading kernels", nullptr, [&] {
      auto resource = std::make_unique<KernelResource>(image_);
      resource->loaded_ = std::make_unique<cuda::CudaKernels>(*image_);
      return resource.release();
    });
  }

  std::int32_t release() noexcept override {
    loaded_.reset();
    return 0;
  }

  cuda::CudaKernels& loaded() const { return *loaded_; }

 private:
  std::shared_ptr<const cuda::KernelImage> image_;
  std::unique_ptr<cuda::CudaKernels> loaded_;
};

}  // namespace

std::shared_ptr<cuda::Launcher> acquire_kernels(const std::shared_ptr<const cuda::KernelImage>& image) {
  nvinfer1::IPluginRegistry* registry = find_registry();
  if (registry == nullptr) throw std::runtime_error("no TensorRT library is loaded in this process");
  const std::string key = "chai-kernels-" + image->hash();
  KernelResource prototype(image);
  auto* resource = static_cast<KernelResource*>(registry->acquirePluginResource(key.c_str(), &prototype));
  if (resource == nullptr)
    throw std::runtime_error("the kernels could not be loaded (see the message before this one)");
  std::shared_ptr<cuda::Launcher> launcher(&resource->loaded(), [registry, key](cuda::Launcher*) {
    registry->releasePluginResource(key.c_str());
  });
  resource->loaded().prepare_device();
  return launcher;
}

}  // namespace chai::tensorrt
