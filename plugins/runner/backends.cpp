#include "runner/backends.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "chai/op_schema.h"
#include "runner/backends/onnxruntime/session.h"
#include "runner/op_nodes.h"
#include "support/error.h"
#ifdef CHAI_WITH_TENSORRT
#include "runner/backends/tensorrt/open.h"
#endif

namespace chai {
namespace {

#ifdef CHAI_WITH_TENSORRT
constexpr const char* kTensorRtLibrary = "libchai_tensorrt.so";
#endif

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

// With a library of another version than the bundle's nodes, ONNX Runtime would run the function body,
// without a word and on caches that share their buffers.
void check_op_version(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return;  // ONNX Runtime will say why
  const auto version = reinterpret_cast<int (*)()>(dlsym(handle, "chai_op_version"));
  const bool fits = version != nullptr && version() == schema::kVersion;
  dlclose(handle);
  require(fits, library + " has not version " + std::to_string(schema::kVersion) +
                    " of the op, which the bundle has; build it again, or correct Options::op_library");
}

void refuse_switching_rope(const std::string& bundle, const Manifest& manifest) {
  require(
      !manifest.switches_rope,
      bundle +
          " has rotary factors that follow the length of a row, which this library does not compute; run it "
          "from Python");
}

std::unique_ptr<Session> open_onnxruntime(const std::string& bundle, const Manifest& manifest,
                                          const Options& options) {
  const std::string library = find_op_library(options.op_library, "libchai_onnxruntime.so");
  if (!library.empty()) check_op_version(library);
  Ort::Env& environment = onnxruntime_environment(options.onnxruntime_library);
  auto session = std::make_unique<OnnxRuntimeSession>(environment, bundle, manifest, options, library);
  check_op_nodes(bundle + "/model.onnx", manifest);
  return session;
}

}  // namespace

const char* name(Backend backend) {
  return backend == Backend::kTensorRt ? "tensorrt" : "onnxruntime";
}

std::unique_ptr<Session> open_session(const std::string& bundle, const Manifest& manifest,
                                      const Options& options) {
  refuse_switching_rope(bundle, manifest);
  if (options.backend == Backend::kOnnxRuntime) return open_onnxruntime(bundle, manifest, options);
#ifdef CHAI_WITH_TENSORRT
  const std::string plugin = find_op_library(options.op_library, kTensorRtLibrary);
  require(!plugin.empty(),
          std::string(kTensorRtLibrary) + " was not found; set Options::op_library to its path");
  check_op_nodes(bundle + "/model.onnx", manifest);
  return open_tensorrt_session(bundle, manifest, options, plugin);
#else
  throw std::runtime_error(
      "this libchai_runtime.so was built without the tensorrt back end; build it with TensorRT_ROOT set");
#endif
}

}  // namespace chai
