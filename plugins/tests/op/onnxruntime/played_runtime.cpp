#include "tests/op/onnxruntime/played_runtime.h"

#include <algorithm>
#include <cstring>

struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> ops;
};
struct OrtTensorTypeAndShapeInfo {
  const OrtValue* value;
};

namespace chai::ort::test {
namespace {

template <typename Value>
OrtStatus* attribute(const std::map<std::string, Value>& values, const char* name, Value* out) {
  const auto found = values.find(name);
  if (found == values.end()) return new OrtStatus{ORT_FAIL, std::string("no attribute ") + name};
  *out = found->second;
  return nullptr;
}

OrtApi make_api() {
  OrtApi api{};
  api.CreateStatus = [](OrtErrorCode code, const char* message) noexcept {
    return new OrtStatus{code, message};
  };
  api.ReleaseStatus = [](OrtStatus* status) { delete status; };
  api.KernelInfoGetAttribute_float = [](const OrtKernelInfo* info, const char* name, float* out) noexcept {
    return attribute(info->floats, name, out);
  };
  api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo* info, const char* name, int64_t* out) noexcept {
    return attribute(info->integers, name, out);
  };
  api.KernelContext_GetInputCount = [](const OrtKernelContext* context, size_t* out) noexcept {
    *out = context->inputs.size();
    return OrtStatusPtr{};
  };
  api.KernelContext_GetInput = [](const OrtKernelContext* context, size_t i, const OrtValue** out) noexcept {
    *out = context->inputs[i].data == nullptr ? nullptr : &context->inputs[i];
    return OrtStatusPtr{};
  };
  api.KernelContext_GetOutput = [](OrtKernelContext* context, size_t i, const int64_t* dims, size_t count,
                                   OrtValue** out) noexcept {
    OrtValue& value = context->outputs[i];
    value.dims.assign(dims, dims + count);
    *out = value.data == nullptr ? nullptr : &value;
    return OrtStatusPtr{};
  };
  api.KernelContext_GetGPUComputeStream = [](const OrtKernelContext* context, void** out) noexcept {
    *out = context->stream;
    return OrtStatusPtr{};
  };
  api.GetTensorTypeAndShape = [](const OrtValue* value, OrtTensorTypeAndShapeInfo** out) noexcept {
    *out = new OrtTensorTypeAndShapeInfo{value};
    return OrtStatusPtr{};
  };
  api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) { delete info; };
  api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info, size_t* out) noexcept {
    *out = info->value->dims.size();
    return OrtStatusPtr{};
  };
  api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count) noexcept {
    std::copy_n(info->value->dims.begin(), count, dims);
    return OrtStatusPtr{};
  };
  api.GetTensorElementType = [](const OrtTensorTypeAndShapeInfo* info,
                                ONNXTensorElementDataType* out) noexcept {
    *out = info->value->type;
    return OrtStatusPtr{};
  };
  api.GetTensorMutableData = [](OrtValue* value, void** out) noexcept {
    *out = value->data;
    return OrtStatusPtr{};
  };
  // Domains stay, as the op's library has them.
  api.CreateCustomOpDomain = [](const char* name, OrtCustomOpDomain** out) noexcept {
    static auto& domains = *new std::vector<OrtCustomOpDomain*>;
    if (std::strcmp(name, "chai") != 0) return new OrtStatus{ORT_FAIL, "another domain"};
    *out = domains.emplace_back(new OrtCustomOpDomain);
    return OrtStatusPtr{};
  };
  api.CustomOpDomain_Add = [](OrtCustomOpDomain* domain, const OrtCustomOp* op) noexcept {
    domain->ops.push_back(op);
    return OrtStatusPtr{};
  };
  api.AddCustomOpDomain = [](OrtSessionOptions* options, OrtCustomOpDomain* domain) noexcept {
    options->ops.insert(options->ops.end(), domain->ops.begin(), domain->ops.end());
    return OrtStatusPtr{};
  };
  api.HasSessionConfigEntry = [](const OrtSessionOptions* options, const char* key, int* out) noexcept {
    *out = static_cast<int>(options->entries.count(key));
    return OrtStatusPtr{};
  };
  api.GetSessionConfigEntry = [](const OrtSessionOptions* options, const char* key, char* value,
                                 size_t* size) noexcept {
    const std::string& found = options->entries.at(key);
    const size_t needed = found.size() + 1;
    if (value != nullptr && *size < needed) return new OrtStatus{ORT_INVALID_ARGUMENT, "too small"};
    *size = needed;
    if (value != nullptr) std::memcpy(value, found.c_str(), needed);
    return OrtStatusPtr{};
  };
  return api;
}

}  // namespace

const OrtApiBase* played_runtime() {
  static const OrtApi api = make_api();
  static const OrtApiBase base = {[](uint32_t) noexcept { return &api; }, []() noexcept { return "played"; }};
  return &base;
}

std::string taken(OrtStatus* status) {
  if (status == nullptr) return "";
  const std::string message = status->message;
  delete status;
  return message;
}

}  // namespace chai::ort::test
