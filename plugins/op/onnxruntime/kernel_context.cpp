#include "op/onnxruntime/kernel_context.h"

#include <thread>

namespace chai::ort {
namespace {

void optional(OrtStatus* status) {
  if (status != nullptr) api->ReleaseStatus(status);
}

std::size_t item_bytes(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return 2;
    default:
      return 1;
  }
}

// The data of a tensor. Programs that bind memory of their own may bind any address.
void* aligned_data(OrtValue* value, ONNXTensorElementDataType type, const char* op, const std::string& name) {
  void* data = nullptr;
  require(api->GetTensorMutableData(value, &data));
  const std::size_t alignment = item_bytes(type);
  if (reinterpret_cast<std::uintptr_t>(data) % alignment != 0) {
    refuse(op, name + " does not start at a multiple of " + std::to_string(alignment) +
                   " bytes, the size of its items; bind memory that does");
  }
  return data;
}

void run_in_pool(void* context, std::size_t count, void (*task)(void*, std::size_t), void* data) {
  // Without a number of batches, threads take one task after the other.
  require(
      api->KernelContext_ParallelFor(static_cast<const OrtKernelContext*>(context), task, count, 0, data));
}

}  // namespace

std::string text(const Dims& dims) {
  std::string result = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) result += (i ? ", " : "") + std::to_string(dims[i]);
  return result + "]";
}

Tensor input(const OrtKernelContext* context, const char* op, const schema::Parameter& parameter,
             std::size_t index) {
  std::size_t given = 0;
  require(api->KernelContext_GetInputCount(context, &given));
  const OrtValue* value = nullptr;
  if (index < given) require(api->KernelContext_GetInput(context, index, &value));
  if (value == nullptr) {
    if (parameter.optional) return {};
    refuse(op, std::string(parameter.name) + " is missing");
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  require(api->GetTensorTypeAndShape(value, &info));
  Tensor tensor;
  std::size_t rank = 0;
  OrtStatus* status = api->GetDimensionsCount(info, &rank);
  if (status == nullptr) {
    tensor.dims.resize(rank);
    status = api->GetDimensions(info, tensor.dims.data(), rank);
  }
  if (status == nullptr) status = api->GetTensorElementType(info, &tensor.type);
  api->ReleaseTensorTypeAndShapeInfo(info);
  require(status);
  if (rank != parameter.rank) {
    refuse(op, std::string(parameter.name) + " has rank " + std::to_string(rank) + ", expected " +
                   std::to_string(parameter.rank));
  }
  tensor.data = aligned_data(const_cast<OrtValue*>(value), tensor.type, op, parameter.name);
  return tensor;
}

void* output(OrtKernelContext* context, const char* op, std::size_t index, const Dims& dims) {
  OrtValue* value = nullptr;
  require(api->KernelContext_GetOutput(context, index, dims.data(), dims.size(), &value));
  const std::string name = "output " + std::to_string(index);
  if (value == nullptr) refuse(op, name + " must be present");
  OrtTensorTypeAndShapeInfo* info = nullptr;
  require(api->GetTensorTypeAndShape(value, &info));
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  OrtStatus* const status = api->GetTensorElementType(info, &type);
  api->ReleaseTensorTypeAndShapeInfo(info);
  require(status);
  return aligned_data(value, type, op, name);
}

void read(const OrtKernelInfo* info, const char* name, float* value) {
  optional(api->KernelInfoGetAttribute_float(info, name, value));
}

void read(const OrtKernelInfo* info, const char* name, std::int64_t* value) {
  optional(api->KernelInfoGetAttribute_int64(info, name, value));
}

cuda::Stream stream(const OrtKernelContext* context) {
  void* found = nullptr;
  require(api->KernelContext_GetGPUComputeStream(context, &found));
  return static_cast<cuda::Stream>(found);
}

Executor executor(const OrtKernelContext* context) {
  // The pool does not tell its size. Asked for once: the C library reads a file for it each time.
  static const std::size_t threads = std::thread::hardware_concurrency();
  Executor executor;
  executor.context = const_cast<OrtKernelContext*>(context);
  executor.run = run_in_pool;
  executor.threads = threads;
  return executor;
}

}  // namespace chai::ort
