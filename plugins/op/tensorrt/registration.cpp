// How TensorRT finds the plugin, in the two ways that its tools load a library.
//
// A plain dlopen (polygraphy's --plugins, ctypes, a program of one's own) must register by itself, when the
// library is loaded. IPluginRegistry::loadLibrary (trtexec's --dynamicPlugins, the Python registry) calls
// getCreators and registers what that returns, and fails if it is registered already; it also begins with a
// dlopen. So what was registered on loading is withdrawn when somebody asks for the creators.
#include <NvInferRuntime.h>

#include <mutex>
#include <string>

#include "op/tensorrt/creator.h"
#include "op/tensorrt/log.h"
#include "op/tensorrt/runtime_library.h"

namespace chai::tensorrt {
namespace {

ClusteredHeadAttentionCreator& creator() {
  static ClusteredHeadAttentionCreator instance;
  return instance;
}

bool fits_runtime() {
  const int major = runtime_major();
  if (major == 0 || major == NV_TENSORRT_MAJOR) return true;
  log(nvinfer1::ILogger::Severity::kERROR,
      "this library was compiled for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
          " and this is TensorRT " + std::to_string(major) +
          "; compile it with TensorRT_ROOT set to the headers of that version");
  return false;
}

class OwnRegistration {
 public:
  OwnRegistration() {
    nvinfer1::IPluginRegistry* registry = find_registry();
    if (registry == nullptr || !fits_runtime()) return;
    creator();  // constructed first, so that it outlives this object
    if (registry->getCreator(kPluginName, kPluginVersion, kPluginNamespace) != nullptr) return;
    if (registry->registerCreator(creator(), kPluginNamespace)) registry_ = registry;
  }

  ~OwnRegistration() { withdraw(); }

  void withdraw() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (registry_ != nullptr) registry_->deregisterCreator(creator());
    registry_ = nullptr;
  }

 private:
  std::mutex mutex_;
  nvinfer1::IPluginRegistry* registry_ = nullptr;
};

OwnRegistration own_registration;

}  // namespace
}  // namespace chai::tensorrt

#define CHAI_EXPORT extern "C" __attribute__((visibility("default")))

CHAI_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  chai::tensorrt::set_logger_finder(finder);
}

CHAI_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&chai::tensorrt::creator()};
  count = 0;
  if (!chai::tensorrt::fits_runtime()) return nullptr;
  chai::tensorrt::own_registration.withdraw();
  count = 1;
  return creators;
}

// Major version of the TensorRT headers this library was compiled with.
CHAI_EXPORT std::int32_t chai_tensorrt_major() {
  return NV_TENSORRT_MAJOR;
}
