// The TensorRT plugin of chai::ClusteredHeadAttention (docs/op.md).
//
// Inputs and outputs in the order of the op, without the optional ones that a node of the compiled form does
// not have: scales of caches that are not in 8 or 4 bits, sinks, slopes. Every tensor is linear (row major).
// Caches in 8 and in 4 bits are kINT8: TensorRT passes kUINT8 to no layer but casts, and to a plugin with
// kINT8 in a linear format the bytes come as they are, whatever they mean. The pools may be, and should be,
// bound as input and output at one address; otherwise they are copied first.
//
// H, G, D, Dv, P, T, bits, group and the terms must be those the kernels were compiled for; B, S, R, the
// pages and the window are free.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "op/cuda/launcher.h"
#include "op/cuda/program.h"
#include "op/tensorrt/attributes.h"
#include "op/tensorrt/names.h"

namespace chai::tensorrt {

namespace op = schema::clustered_head_attention;

class ClusteredHeadAttention final : public nvinfer1::IPluginV3,
                                     public nvinfer1::IPluginV3OneCore,
                                     public nvinfer1::IPluginV3OneBuildV2,
                                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // Throws std::runtime_error when the attributes and the kernels do not go together.
  explicit ClusteredHeadAttention(Attributes attributes);

  // Use this launcher instead of the GPU's.
  void use_launcher(std::shared_ptr<cuda::Launcher> launcher) { launcher_ = std::move(launcher); }

  // Positions in the op's schema of the tensors that a node of this form has, in order.
  const std::vector<std::size_t>& inputs() const { return inputs_; }
  const std::vector<std::size_t>& outputs() const { return outputs_; }

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // Core
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
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
  std::int32_t getNbOutputs() const noexcept override { return static_cast<std::int32_t>(outputs_.size()); }
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

  void require_counts(std::int32_t num_inputs, std::int32_t num_outputs) const;
  void require_compiled_for(const cuda::Symbols& sizes) const;
  void require_attributes() const;
  nvinfer1::DataType type_of(std::size_t input) const;
  // The place of an input of the op among those of the node, which has it.
  std::size_t place_of(std::size_t input) const;
  cuda::Symbols sizes_of(const std::vector<nvinfer1::Dims>& dims) const;
  cuda::Symbols largest_sizes(const nvinfer1::DynamicPluginTensorDesc* in) const;
  cuda::Symbols checked_sizes(const nvinfer1::PluginTensorDesc* in) const;
  void require_address(const char* name, const void* address, std::size_t input) const;
  void attend(const nvinfer1::PluginTensorDesc* in, const void* const* inputs, void* const* outputs,
              void* workspace, cudaStream_t stream);
  const cuda::Plan& plan_for(const cuda::Symbols& sizes);

  Attributes attributes_;
  std::shared_ptr<const cuda::Program> program_;
  std::vector<std::size_t> inputs_;
  std::vector<std::size_t> outputs_;
  std::string identity_;
  std::shared_ptr<cuda::Launcher> launcher_;

  cuda::Symbols planned_sizes_;
  cuda::Plan plan_;

  std::vector<nvinfer1::PluginField> fields_;  // of the last getFieldsToSerialize
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace chai::tensorrt
