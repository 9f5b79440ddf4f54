#include "op/tensorrt/tensors.h"

#include <stdexcept>
#include <type_traits>

namespace chai::tensorrt {

nvinfer1::DataType data_type(const std::string& dtype) {
  if (dtype == "float16") return nvinfer1::DataType::kHALF;
  if (dtype == "bfloat16") return nvinfer1::DataType::kBF16;
  return nvinfer1::DataType::kFLOAT;
}

std::string text(const nvinfer1::Dims& dims) {
  std::string result = "[";
  for (std::int32_t i = 0; i < dims.nbDims; ++i) result += (i > 0 ? "," : "") + std::to_string(dims.d[i]);
  return result + "]";
}

void require_shape(const char* name, const nvinfer1::Dims& dims, std::initializer_list<std::int64_t> wanted) {
  nvinfer1::Dims expected{};
  expected.nbDims = static_cast<std::int32_t>(wanted.size());
  bool same = dims.nbDims == expected.nbDims;
  std::int32_t i = 0;
  for (const std::int64_t size : wanted) {
    expected.d[i] = static_cast<std::remove_reference_t<decltype(expected.d[0])>>(size);
    same = same && dims.d[i] == expected.d[i];
    ++i;
  }
  if (!same)
    throw std::runtime_error(std::string(name) + " has shape " + text(dims) + ", expected " + text(expected));
}

}  // namespace chai::tensorrt
