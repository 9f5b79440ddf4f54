#include "op/tensorrt/creator.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "op/tensorrt/attributes.h"
#include "op/tensorrt/log.h"
#include "op/tensorrt/v2/plugin.h"

namespace chai::tensorrt {

ClusteredHeadAttentionCreator::ClusteredHeadAttentionCreator(std::int64_t version)
    : version_(version), version_text_(std::to_string(version)) {
  for (const FieldSpec& spec : field_table(version)) {
    if (spec.advertised) fields_.push_back({spec.name, nullptr, spec.type, 1});
  }
  collection_.nbFields = static_cast<std::int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

nvinfer1::IPluginV3* ClusteredHeadAttentionCreator::createPlugin(
    const char* name, const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase) noexcept {
  return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&]() -> nvinfer1::IPluginV3* {
    try {
      Attributes attributes = read_attributes(fields, phase, version_);
      if (version_ == schema::kVersion) return new v2::ClusteredHeadAttention(std::move(attributes));
      return new ClusteredHeadAttention(std::move(attributes));
    } catch (const std::exception& error) {
      throw std::runtime_error("layer '" + std::string(name == nullptr ? "" : name) + "': " + error.what());
    }
  });
}

}  // namespace chai::tensorrt
