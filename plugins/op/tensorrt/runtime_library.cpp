#include "op/tensorrt/runtime_library.h"

#include <dlfcn.h>
#include <link.h>

#include <cstddef>
#include <string_view>

namespace chai::tensorrt {
namespace {

struct Search {
  const char* symbol;
  void* found;
};

// Python loads TensorRT with local symbols, so that the default search misses them: ask the library itself.
int look_in(struct dl_phdr_info* info, std::size_t, void* data) {
  auto* search = static_cast<Search*>(data);
  const std::string_view path(info->dlpi_name == nullptr ? "" : info->dlpi_name);
  const std::string_view name = path.substr(path.rfind('/') + 1);
  const bool is_runtime = name.rfind("libnvinfer.so", 0) == 0 || name.rfind("libnvinfer_lean.so", 0) == 0 ||
                          name.rfind("libnvinfer_dispatch.so", 0) == 0;
  if (!is_runtime) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return 0;
  search->found = dlsym(library, search->symbol);
  dlclose(library);
  return search->found != nullptr ? 1 : 0;
}

template <typename Function>
Function find(const char* symbol) {
  Search search{symbol, dlsym(RTLD_DEFAULT, symbol)};
  if (search.found == nullptr) dl_iterate_phdr(look_in, &search);
  return reinterpret_cast<Function>(search.found);
}

}  // namespace

nvinfer1::IPluginRegistry* find_registry() {
  auto* get = find<nvinfer1::IPluginRegistry* (*)()>("getPluginRegistry");
  return get != nullptr ? get() : nullptr;
}

nvinfer1::ILogger* find_logger() {
  auto* get = find<nvinfer1::ILogger* (*)()>("getLogger");
  return get != nullptr ? get() : nullptr;
}

int runtime_major() {
  auto* get = find<int (*)()>("getInferLibMajorVersion");
  return get != nullptr ? get() : 0;
}

}  // namespace chai::tensorrt
