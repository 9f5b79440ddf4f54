// The TensorRT plugin of chai::ClusteredHeadAttention, version 1.
//
// Inputs and outputs in the order of the op. T is float32, float16 or bfloat16, every tensor linear (row
// major):
//
//   0 query T [B,H,S,D]           8  output           T [B,S,H*Dv]
//   1 key T [B,G,S,D]             9  present_key      T [B,R,C,D]   may be past_key
//   2 value T [B,G,S,Dv]          10 present_value    T [B,G,C,Dv]  may be past_value
//   3 past_key T [B,R,C,D]        11 present_head_map int32 [B,H]   must not be past_head_map
//   4 past_value T [B,G,C,Dv]
//   5 past_head_map int32 [B,H]
//   6 past_lengths int32 [B]
//   7 lengths int32 [B]
//
// H, G, D, Dv, P and T must be those the kernels were compiled for; B, S, R and C are free.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "op/cuda/launcher.h"
#include "op/cuda/program.h"
#include "op/tensorrt/attributes.h"
#include "op/tensorrt/names.h"
#include "op/tensorrt/schema_v1.h"

namespace chai::tensorrt {

namespace op = schema::clustered_head_attention_v1;

constexpr std::int32_t kNumInputs = std::size(op::kInputs);
constexpr std::int32_t kNumOutputs = std::size(op::kOutputs);

class ClusteredHeadAttention final : public nvinfer1::IPluginV3,
                                     public nvinfer1::IPluginV3OneCore,
                                     public nvinfer1::IPluginV3OneBuildV2,
                                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // Throws std::runtime_error when the attributes and the kernels do not go together.
  explicit ClusteredHeadAttention(Attributes attributes);

  // Use this launcher instead of the GPU's.
  void use_launcher(std::shared_ptr<cuda::Launcher> launcher) { launcher_ = std::move(launcher); }

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // Core
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return "1"; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // Build
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t num_inputs,
                               const nvinfer1::DynamicPluginTensorDesc* out,
                               std::int32_t num_outputs) noexcept override;
  std::int32_t getOutputDataTypes(nvinfer1::DataType* output_types, std::int32_t num_outputs,
                                  const nvinfer1::DataType* input_types,
                                  std::int32_t num_inputs) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t num_inputs,
                               const nvinfer1::DimsExprs* shape_inputs, std::int32_t num_shape_inputs,
                               nvinfer1::DimsExprs* outputs, std::int32_t num_outputs,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* in_out,
                                 std::int32_t num_inputs, std::int32_t num_outputs) noexcept override;
  std::int32_t getNbOutputs() const noexcept override { return kNumOutputs; }
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t num_inputs,
                               const nvinfer1::DynamicPluginTensorDesc* outputs,
                               std::int32_t num_outputs) const noexcept override;
  // Only asked when the preview feature kALIASED_PLUGIN_IO_10_03 is on.
  std::int32_t getAliasedInput(std::int32_t output_index) noexcept override;
  const char* getTimingCacheID() noexcept override { return identity_.c_str(); }
  const char* getMetadataString() noexcept override { return identity_.c_str(); }

  // Runtime
  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, std::int32_t num_inputs,
                             const nvinfer1::PluginTensorDesc* out,
                             std::int32_t num_outputs) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc,
                       const nvinfer1::PluginTensorDesc* output_desc, const void* const* inputs,
                       void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  ClusteredHeadAttention(const ClusteredHeadAttention& other) = default;

  void require_compiled_for(const cuda::Symbols& sizes) const;
  cuda::Symbols checked_sizes(const nvinfer1::PluginTensorDesc* in) const;
  void require_address(const char* name, const void* address, bool is_integer) const;
  void attend(const nvinfer1::PluginTensorDesc* in, const void* const* inputs, void* const* outputs,
              void* workspace, cudaStream_t stream);
  const cuda::Plan& plan_for(const cuda::Symbols& sizes);

  Attributes attributes_;
  std::shared_ptr<const cuda::Program> program_;
  std::string identity_;
  std::shared_ptr<cuda::Launcher> launcher_;

  cuda::Symbols planned_sizes_;
  cuda::Plan plan_;

  std::vector<nvinfer1::PluginField> fields_;  // of the last getFieldsToSerialize
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace chai::tensorrt
