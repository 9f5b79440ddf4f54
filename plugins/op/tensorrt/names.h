// How the plugin is found in TensorRT's registry.
#pragma once

#include "chai/op_schema.h"

namespace chai::tensorrt {

constexpr const char* kPluginName = schema::clustered_head_attention::kOpType;
constexpr const char* kPluginVersion = "2";
static_assert(schema::kVersion == 2, "the plugin's version is the op's");
constexpr const char* kPluginNamespace = schema::kDomain;

}  // namespace chai::tensorrt
