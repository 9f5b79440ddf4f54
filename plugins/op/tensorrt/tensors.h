// Types and shapes of TensorRT's tensors, checked and as text.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace chai::tensorrt {

// Of float32, float16 and bfloat16.
nvinfer1::DataType data_type(const std::string& dtype);

std::string text(const nvinfer1::Dims& dims);

// Throws std::runtime_error.
void require_shape(const char* name, const nvinfer1::Dims& dims, std::initializer_list<std::int64_t> wanted);

}  // namespace chai::tensorrt
