// ONNX Runtime's C API as far as the op uses it, played on the host: one node's tensors and attributes.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct OrtValue {
  void* data = nullptr;
  std::vector<std::int64_t> dims;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
};

struct OrtStatus {
  OrtErrorCode code;
  std::string message;
};

struct OrtKernelInfo {
  std::map<std::string, float> floats;
  std::map<std::string, std::int64_t> integers;
};

// Inputs without data are absent. Outputs get the sizes that the op asks for.
struct OrtKernelContext {
  std::vector<OrtValue> inputs, outputs;
  void* stream = nullptr;
};

struct OrtSessionOptions {
  std::map<std::string, std::string> entries;
  std::vector<const OrtCustomOp*> ops;  // of the domains that were added
};

namespace chai::ort::test {

const OrtApiBase* played_runtime();

// Its message; frees it. "" for nullptr.
std::string taken(OrtStatus* status);

}  // namespace chai::ort::test
