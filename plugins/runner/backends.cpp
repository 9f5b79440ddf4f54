#include "runner/backends.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "runner/backends/onnxruntime/session.h"
#include "runner/op_nodes.h"
#include "support/error.h"
#ifdef CHAI_WITH_TENSORRT
#include "runner/backends/tensorrt/open.h"
#endif

namespace chai {
namespace {

// The directory of this library.
std::filesystem::path own_directory() {
  Dl_info info{};
  const bool known = dladdr(reinterpret_cast<const void*>(&own_directory), &info) != 0;
  return known ? std::filesystem::path(info.dli_fname).parent_path() : std::filesystem::path();
}

// Path of the op library, empty if there is none.
std::string find_op_library(const std::optional<std::string>& given, const char* file) {
  if (given.has_value()) {
    require(given->empty() || std::filesystem::exists(*given),
            *given + " is missing; correct Options::op_library");
    return *given;
  }
  const char* native = std::getenv("CHAI_EXPORT_NATIVE");
  if (native != nullptr && std::strcmp(native, "0") == 0) return "";
  const std::filesystem::path path = own_directory() / file;
  return std::filesystem::exists(path) ? path.string() : "";
}

}  // namespace

const char* name(Backend backend) {
  return backend == Backend::kTensorRt ? "tensorrt" : "onnxruntime";
}

std::unique_ptr<Session> open_session(const std::string& bundle, const Manifest& manifest,
                                      const Options& options) {
  require(
      !manifest.switches_rope,
      bundle +
          " has rotary factors that follow the length of a row, which this library does not compute; run it "
          "from Python");
  if (options.backend == Backend::kOnnxRuntime) {
    const std::string library = find_op_library(options.op_library, "libchai_onnxruntime.so");
    Ort::Env& environment = onnxruntime_environment(options.onnxruntime_library);
    auto session = std::make_unique<OnnxRuntimeSession>(environment, bundle, manifest, options, library);
    check_op_nodes(bundle + "/model.onnx", manifest);
    return session;
  }
#ifdef CHAI_WITH_TENSORRT
  const std::string plugin = find_op_library(options.op_library, "libchai_tensorrt.so");
  require(!plugin.empty(), "libchai_tensorrt.so was not found; set Options::op_library to its path");
  check_op_nodes(bundle + "/model.onnx", manifest);
  return open_tensorrt_session(bundle, manifest, options, plugin);
#else
  throw std::runtime_error(
      "this libchai_runtime.so was built without the tensorrt back end; build it with TensorRT_ROOT set");
#endif
}

}  // namespace chai
