// What a plugin object is made of, and the one table that creating, serialising and restoring go through.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "op/cuda/kernel_image.h"

namespace chai::tensorrt {

// A value type: copying it copies everything, which is how a plugin is cloned.
struct Attributes {
  float scale = 0.0f;  // 0: 1/sqrt(D)
  std::int32_t probe_tokens = 0;
  std::int32_t online = 0;
  std::shared_ptr<const cuda::KernelImage> kernels;
  std::int32_t key_bits = 0;
  std::int32_t value_bits = 0;
  std::int32_t group = 0;
  std::int32_t window = 0;
  float softcap = 0.0f;
};

// One field. `advertised` ones are attributes of the ONNX
// node; `serialised` ones are what an engine carries.
struct FieldSpec {
  const char* name;
  nvinfer1::PluginFieldType type;
  bool advertised;
  bool serialised;
  void (*read)(const nvinfer1::PluginField& field, Attributes& attributes);
  // Points into `attributes`.
  nvinfer1::PluginField (*view)(const FieldSpec& spec, const Attributes& attributes);
};

const std::vector<FieldSpec>& field_table();

// Attributes from the fields of a node (phase kBUILD) or of an engine (kRUNTIME). Throws std::runtime_error
// when a field is missing, unknown, given twice, of the wrong type or out of range.
Attributes read_attributes(const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase);

// The serialised fields; they point into `attributes`.
std::vector<nvinfer1::PluginField> serialised_fields(const Attributes& attributes);

}  // namespace chai::tensorrt
