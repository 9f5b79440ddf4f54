// ONNX Runtime's C API as the ops use it: errors as exceptions, tensors with checked ranks.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "chai/attention.h"
#include "chai/op_schema.h"
#include "op/cuda/launcher.h"

namespace chai::ort {

// The oldest C API with everything used here, so that the library runs in any later ONNX Runtime, whatever
// headers it was compiled with.
constexpr std::uint32_t kApiVersion = 18;

// Set once, before any op is registered.
inline const OrtApi* api = nullptr;

// A status of ONNX Runtime on its way to the runtime.
struct Failure {
  OrtStatus* status;
};

inline void require(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

[[noreturn]] inline void refuse(const char* op, const std::string& reason) {
  const std::string message = std::string(schema::kDomain) + "::" + op + ": " + reason;
  throw Failure{api->CreateStatus(ORT_INVALID_ARGUMENT, message.c_str())};
}

// Every callback that may fail goes through here: no exception crosses the C boundary.
template <typename Body>
OrtStatus* guarded(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api->CreateStatus(ORT_FAIL, "unknown error");
  }
}

using Dims = std::vector<std::int64_t>;

// An input that a node leaves out has no data.
struct Tensor {
  const void* data = nullptr;
  Dims dims;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

  explicit operator bool() const { return data != nullptr; }
  const std::int32_t* integers() const { return static_cast<const std::int32_t*>(data); }
};

std::string text(const Dims& dims);

// Input `index`, which has the rank that its parameter says. Data of inputs and outputs starts at a multiple
// of the size of its items.
Tensor input(const OrtKernelContext* context, const char* op, const schema::Parameter& parameter,
             std::size_t index);
void* output(OrtKernelContext* context, const char* op, std::size_t index, const Dims& dims);

// Attributes that a node leaves out keep their defaults.
void read(const OrtKernelInfo* info, const char* name, float* value);
void read(const OrtKernelInfo* info, const char* name, std::int64_t* value);

// Work for the GPU goes here.
cuda::Stream stream(const OrtKernelContext* context);

// ONNX Runtime's threads.
Executor executor(const OrtKernelContext* context);

}  // namespace chai::ort
