#include "runner/backends/onnxruntime/library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace chai {
namespace {

constexpr std::uint32_t kApiVersion = 18;
constexpr const char* kEntry = "OrtGetApiBase";
using GetApiBase = const OrtApiBase*(ORT_API_CALL*)();

GetApiBase entry_of(void* library) {
  return reinterpret_cast<GetApiBase>(dlsym(library, kEntry));  // POSIX guarantees this cast
}

GetApiBase open_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("ONNX Runtime does not load: ") + dlerror());
  const GetApiBase entry = entry_of(library);
  if (entry == nullptr) throw std::runtime_error(path + " is not ONNX Runtime (it lacks " + kEntry + ")");
  return entry;
}

GetApiBase find_library(const std::string& path) {
  if (!path.empty()) return open_library(path);
  const char* named = std::getenv("CHAI_ONNXRUNTIME_LIBRARY");
  if (named != nullptr && *named != '\0') return open_library(named);
  if (const GetApiBase entry = entry_of(RTLD_DEFAULT)) return entry;
  if (*CHAI_ONNXRUNTIME_LIBRARY != '\0') return open_library(CHAI_ONNXRUNTIME_LIBRARY);
  try {
    return open_library("libonnxruntime.so.1");
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(error.what()) +
                             "; set CHAI_ONNXRUNTIME_LIBRARY to the path of libonnxruntime.so");
  }
}

// Otherwise ONNX Runtime writes an identity and a database of events into the user's cache.
void disable_telemetry() {
  constexpr int kKeepWhatIsSet = 0;
  setenv("ORT_DISABLE_TELEMETRY", "1", kKeepWhatIsSet);
}

Ort::Env make_environment(const std::string& path) {
  disable_telemetry();
  const OrtApiBase* base = find_library(path)();
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr)
    throw std::runtime_error(std::string("ONNX Runtime ") + base->GetVersionString() +
                             " is too old; use 1.18 or newer");
  Ort::InitApi(api);
  return Ort::Env(ORT_LOGGING_LEVEL_ERROR, "chai");
}

}  // namespace

Ort::Env& onnxruntime_environment(const std::string& path) {
  // Never destroyed: ONNX Runtime's own statics may be gone before ours at the end of a program.
  static Ort::Env* const environment = new Ort::Env(make_environment(path));
  return *environment;
}

}  // namespace chai
