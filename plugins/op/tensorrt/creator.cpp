#include "op/tensorrt/creator.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "op/tensorrt/attributes.h"
#include "op/tensorrt/log.h"

namespace chai::tensorrt {

ClusteredHeadAttentionCreator::ClusteredHeadAttentionCreator() {
  for (const FieldSpec& spec : field_table()) {
    if (spec.advertised) fields_.push_back({spec.name, nullptr, spec.type, 1});
  }
  collection_.nbFields = static_cast<std::int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

nvinfer1::IPluginV3* ClusteredHeadAttentionCreator::createPlugin(
    const char* name, const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase) noexcept {
  return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&]() -> nvinfer1::IPluginV3* {
    try {
      return new ClusteredHeadAttention(read_attributes(fields, phase));
    } catch (const std::exception& error) {
      throw std::runtime_error("layer '" + std::string(name == nullptr ? "" : name) + "': " + error.what());
    }
  });
}

}  // namespace chai::tensorrt
