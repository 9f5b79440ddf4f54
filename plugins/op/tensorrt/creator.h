// Makes plugin objects from fields: those of an ONNX node while building, those an engine carries afterwards.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "op/tensorrt/plugin.h"

namespace chai::tensorrt {

class ClusteredHeadAttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  ClusteredHeadAttentionCreator();

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace chai::tensorrt
