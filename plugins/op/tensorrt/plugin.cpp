#include "op/tensorrt/plugin.h"

#include <array>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "op/tensorrt/kernel_resource.h"
#include "op/tensorrt/log.h"
#include "op/tensorrt/tensors.h"

namespace chai::tensorrt {
namespace {

using cuda::KernelSpec;
using cuda::Plan;
using cuda::Program;
using cuda::Symbol;
using cuda::Symbols;
using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr std::int32_t kSuccess = 0;
constexpr std::int32_t kFailure = 1;

using namespace op;  // kQuery, kOutput, …

// The input whose type and shape an output has; only `output` has a shape of its own.
constexpr std::array<std::int32_t, kNumOutputs> kLikeInput = {kQuery, kPastKey, kPastValue, kPastHeadMap};

bool is_integer_input(std::int32_t index) {
  return kInputs[index].type == schema::Type::M;
}

std::size_t item_bytes(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 2;
}

void require_counts(std::int32_t num_inputs, std::int32_t num_outputs) {
  if (num_inputs == kNumInputs && num_outputs == kNumOutputs) return;
  throw std::runtime_error("needs " + std::to_string(kNumInputs) + " inputs and " +
                           std::to_string(kNumOutputs) + " outputs, got " + std::to_string(num_inputs) +
                           " and " + std::to_string(num_outputs));
}

// The sizes that a set of input shapes has, read off without checking that they agree.
Symbols sizes_of(const std::array<Dims, kNumInputs>& dims, const Attributes& attributes) {
  for (std::int32_t i = 0; i < kNumInputs; ++i) {
    if (dims[i].nbDims != static_cast<std::int32_t>(kInputs[i].rank)) {
      throw std::runtime_error(std::string(kInputs[i].name) + " has shape " + text(dims[i]) +
                               ", expected rank " +
                               std::to_string(static_cast<std::int32_t>(kInputs[i].rank)));
    }
  }
  Symbols sizes;
  sizes[Symbol::kB] = dims[kQuery].d[0];
  sizes[Symbol::kH] = dims[kQuery].d[1];
  sizes[Symbol::kS] = dims[kQuery].d[2];
  sizes[Symbol::kD] = dims[kQuery].d[3];
  sizes[Symbol::kG] = dims[kKey].d[1];
  sizes[Symbol::kDv] = dims[kValue].d[3];
  sizes[Symbol::kR] = dims[kPastKey].d[1];
  sizes[Symbol::kC] = dims[kPastKey].d[2];
  sizes[Symbol::kP] = attributes.probe_tokens;
  sizes[Symbol::kOnline] = attributes.online;
  return sizes;
}

// The largest sizes that a profile allows.
Symbols largest_sizes(const DynamicPluginTensorDesc* in, const Attributes& attributes) {
  std::array<Dims, kNumInputs> dims{};
  for (std::int32_t i = 0; i < kNumInputs; ++i) dims[i] = in[i].max;
  return sizes_of(dims, attributes);
}

}  // namespace

ClusteredHeadAttention::ClusteredHeadAttention(Attributes attributes) : attributes_(std::move(attributes)) {
  program_ = std::make_shared<const Program>(Program::parse(attributes_.kernels->file(cuda::kIndexFile)));
  require_kernels_of_version(*program_, op::kVersion);
  if (program_->spec().probe_tokens != attributes_.probe_tokens) {
    throw std::runtime_error("the kernels were compiled for probe_tokens " +
                             std::to_string(program_->spec().probe_tokens) + " and the node has " +
                             std::to_string(attributes_.probe_tokens) +
                             "; build again with `chai-export build --backend tensorrt`");
  }
  identity_ = std::string(kPluginName) + " 1" + " scale=" + std::to_string(attributes_.scale) +
              " probe_tokens=" + std::to_string(attributes_.probe_tokens) +
              " online=" + std::to_string(attributes_.online) + " kernels=" + attributes_.kernels->hash();
}

nvinfer1::IPluginCapability* ClusteredHeadAttention::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* ClusteredHeadAttention::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>("clone", nullptr, [&] { return new ClusteredHeadAttention(*this); });
}

void ClusteredHeadAttention::require_compiled_for(const Symbols& sizes) const {
  const KernelSpec& spec = program_->spec();
  const std::array<std::tuple<const char*, std::int64_t, std::int64_t>, 4> constants = {
      {{"query heads", spec.heads, sizes[Symbol::kH]},
       {"KV heads", spec.kv_heads, sizes[Symbol::kG]},
       {"head dim", spec.head_dim, sizes[Symbol::kD]},
       {"value head dim", spec.value_dim, sizes[Symbol::kDv]}}};
  for (const auto& [name, compiled, found] : constants) {
    if (compiled == found) continue;
    throw std::runtime_error("the kernels were compiled for " + std::to_string(compiled) + " " + name +
                             " and the model has " + std::to_string(found) +
                             "; build again with `chai-export build --backend tensorrt`");
  }
  if (sizes[Symbol::kR] < 1 || sizes[Symbol::kR] > spec.kv_heads) {
    throw std::runtime_error("past_key keeps " + std::to_string(sizes[Symbol::kR]) +
                             " heads, allowed are 1 to " + std::to_string(spec.kv_heads));
  }
}

std::int32_t ClusteredHeadAttention::configurePlugin(const DynamicPluginTensorDesc* in,
                                                     std::int32_t num_inputs, const DynamicPluginTensorDesc*,
                                                     std::int32_t num_outputs) noexcept {
  return guarded("configurePlugin", kFailure, [&] {
    require_counts(num_inputs, num_outputs);
    require_compiled_for(largest_sizes(in, attributes_));
    return kSuccess;
  });
}

std::int32_t ClusteredHeadAttention::getOutputDataTypes(DataType* output_types, std::int32_t num_outputs,
                                                        const DataType* input_types,
                                                        std::int32_t num_inputs) const noexcept {
  return guarded("getOutputDataTypes", kFailure, [&] {
    require_counts(num_inputs, num_outputs);
    const DataType wanted = data_type(program_->spec().dtype);
    for (std::int32_t i = 0; i < kNumInputs; ++i) {
      if (input_types[i] == (is_integer_input(i) ? DataType::kINT32 : wanted)) continue;
      throw std::runtime_error(std::string(kInputs[i].name) + " must be " +
                               (is_integer_input(i) ? "int32" : program_->spec().dtype));
    }
    for (std::int32_t i = 0; i < kNumOutputs; ++i) output_types[i] = input_types[kLikeInput[i]];
    return kSuccess;
  });
}

std::int32_t ClusteredHeadAttention::getOutputShapes(const nvinfer1::DimsExprs* inputs,
                                                     std::int32_t num_inputs, const nvinfer1::DimsExprs*,
                                                     std::int32_t, nvinfer1::DimsExprs* outputs,
                                                     std::int32_t num_outputs,
                                                     nvinfer1::IExprBuilder& builder) noexcept {
  return guarded("getOutputShapes", kFailure, [&] {
    require_counts(num_inputs, num_outputs);
    for (std::int32_t i = 0; i < kNumInputs; ++i) {
      if (inputs[i].nbDims == static_cast<std::int32_t>(kInputs[i].rank)) continue;
      throw std::runtime_error(std::string(kInputs[i].name) + " has rank " +
                               std::to_string(inputs[i].nbDims) + ", expected " +
                               std::to_string(static_cast<std::int32_t>(kInputs[i].rank)));
    }
    for (std::int32_t i = 1; i < kNumOutputs; ++i) outputs[i] = inputs[kLikeInput[i]];
    outputs[kOutput].nbDims = 3;
    outputs[kOutput].d[0] = inputs[kQuery].d[0];
    outputs[kOutput].d[1] = inputs[kQuery].d[2];
    outputs[kOutput].d[2] =
        builder.operation(nvinfer1::DimensionOperation::kPROD, *inputs[kQuery].d[1], *inputs[kValue].d[3]);
    if (outputs[kOutput].d[2] == nullptr)
      throw std::runtime_error("TensorRT refuses the product of H and Dv");
    return kSuccess;
  });
}

bool ClusteredHeadAttention::supportsFormatCombination(std::int32_t position,
                                                       const DynamicPluginTensorDesc* in_out,
                                                       std::int32_t num_inputs,
                                                       std::int32_t num_outputs) noexcept {
  return guarded("supportsFormatCombination", false, [&] {
    require_counts(num_inputs, num_outputs);
    if (position < 0 || position >= kNumInputs + kNumOutputs) return false;
    const std::int32_t like = position < kNumInputs ? position : kLikeInput[position - kNumInputs];
    const DataType wanted = is_integer_input(like) ? DataType::kINT32 : data_type(program_->spec().dtype);
    const PluginTensorDesc& desc = in_out[position].desc;
    return desc.format == TensorFormat::kLINEAR && desc.type == wanted;
  });
}

std::size_t ClusteredHeadAttention::getWorkspaceSize(const DynamicPluginTensorDesc* inputs,
                                                     std::int32_t num_inputs, const DynamicPluginTensorDesc*,
                                                     std::int32_t num_outputs) const noexcept {
  // There is no way to report an error here; with no workspace, enqueue reports one.
  return guarded<std::size_t>("getWorkspaceSize", 0, [&] {
    require_counts(num_inputs, num_outputs);
    return program_->workspace_bytes(largest_sizes(inputs, attributes_));
  });
}

std::int32_t ClusteredHeadAttention::getAliasedInput(std::int32_t output_index) noexcept {
  return output_index == kPresentKey || output_index == kPresentValue ? kLikeInput[output_index] : -1;
}

cuda::Symbols ClusteredHeadAttention::checked_sizes(const PluginTensorDesc* in) const {
  std::array<Dims, kNumInputs> dims{};
  for (std::int32_t i = 0; i < kNumInputs; ++i) dims[i] = in[i].dims;
  const Symbols sizes = sizes_of(dims, attributes_);
  require_compiled_for(sizes);
  const std::int64_t b = sizes[Symbol::kB];
  const std::int64_t g = sizes[Symbol::kG];
  const std::int64_t s = sizes[Symbol::kS];
  const std::int64_t c = sizes[Symbol::kC];
  const std::int64_t d = sizes[Symbol::kD];
  const std::int64_t dv = sizes[Symbol::kDv];
  if (b < 1 || s < 1 || c < 1)
    throw std::runtime_error("query " + text(dims[kQuery]) + " or past_key " + text(dims[kPastKey]) +
                             " is empty");
  require_shape("key", dims[kKey], {b, g, s, d});
  require_shape("value", dims[kValue], {b, g, s, dv});
  require_shape("past_key", dims[kPastKey], {b, sizes[Symbol::kR], c, d});
  require_shape("past_value", dims[kPastValue], {b, g, c, dv});
  require_shape("past_head_map", dims[kPastHeadMap], {b, sizes[Symbol::kH]});
  require_shape("past_lengths", dims[kPastLengths], {b});
  require_shape("lengths", dims[kLengths], {b});
  return sizes;
}

const cuda::Plan& ClusteredHeadAttention::plan_for(const Symbols& sizes) {
  if (plan_.empty() || planned_sizes_ != sizes) {
    plan_ = program_->plan(sizes);
    planned_sizes_ = sizes;
  }
  return plan_;
}

std::int32_t ClusteredHeadAttention::onShapeChange(const PluginTensorDesc* in, std::int32_t num_inputs,
                                                   const PluginTensorDesc*,
                                                   std::int32_t num_outputs) noexcept {
  return guarded("onShapeChange", kFailure, [&] {
    require_counts(num_inputs, num_outputs);
    plan_for(checked_sizes(in));
    // While building, TensorRT may run a plugin that was never attached to a context.
    if (launcher_ == nullptr) launcher_ = acquire_kernels(attributes_.kernels);
    return kSuccess;
  });
}

void ClusteredHeadAttention::require_address(const char* name, const void* address, bool is_integer) const {
  if (address == nullptr) throw std::runtime_error(std::string(name) + " has no address");
  const std::size_t alignment = is_integer ? sizeof(std::int32_t) : program_->pointer_alignment();
  if (reinterpret_cast<std::uintptr_t>(address) % alignment != 0) {
    throw std::runtime_error(std::string(name) + " does not start at a multiple of " +
                             std::to_string(alignment) + " bytes");
  }
}

std::int32_t ClusteredHeadAttention::enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc*,
                                             const void* const* inputs, void* const* outputs, void* workspace,
                                             cudaStream_t stream) noexcept {
  return guarded("enqueue", kFailure, [&] {
    attend(input_desc, inputs, outputs, workspace, stream);
    return kSuccess;
  });
}

void ClusteredHeadAttention::attend(const PluginTensorDesc* in, const void* const* inputs,
                                    void* const* outputs, void* workspace, cudaStream_t stream) {
  if (in == nullptr || inputs == nullptr || outputs == nullptr)
    throw std::runtime_error("called without tensors");
  const Symbols sizes = checked_sizes(in);
  for (std::int32_t i = 0; i < kNumInputs; ++i) {
    require_address(kInputs[i].name, inputs[i], is_integer_input(i));
  }
  for (std::int32_t i = 0; i < kNumOutputs; ++i) {
    require_address(kOutputs[i].name, outputs[i], is_integer_input(kLikeInput[i]));
  }
  if (outputs[kPresentHeadMap] == inputs[kPastHeadMap]) {
    throw std::runtime_error(
        "past_head_map and present_head_map have one address; only the caches may be shared");
  }
  if (workspace == nullptr && program_->workspace_bytes(sizes) > 0)
    throw std::runtime_error("called without workspace");
  // Not here, where a graph may be captured and others may be waiting for the stream.
  if (launcher_ == nullptr)
    throw std::runtime_error("called before attachToContext and onShapeChange, which load the kernels");

  for (const std::size_t output : {kPresentKey, kPresentValue}) {
    const std::int32_t past = kLikeInput[output];
    if (outputs[output] == inputs[past]) continue;
    std::size_t bytes = item_bytes(in[past].type);
    for (std::int32_t i = 0; i < in[past].dims.nbDims; ++i)
      bytes *= static_cast<std::size_t>(in[past].dims.d[i]);
    launcher_->copy(outputs[output], inputs[past], bytes, stream);
  }
  // Kernel arguments are not const; kernels only read what the op calls an input.
  const auto input = [&](std::size_t i) { return const_cast<void*>(inputs[i]); };
  const cuda::Tensors tensors = {input(kQuery),           input(kKey),          input(kValue),
                                 input(kPastHeadMap),     input(kPastLengths),  input(kLengths),
                                 outputs[kOutput],        outputs[kPresentKey], outputs[kPresentValue],
                                 outputs[kPresentHeadMap]};
  const float scale =
      attributes_.scale != 0.0f ? attributes_.scale : 1.0f / std::sqrt(static_cast<float>(sizes[Symbol::kD]));
  cuda::run(plan_for(sizes), tensors, workspace, {scale, 0.0f}, *launcher_, stream);
}

nvinfer1::IPluginV3* ClusteredHeadAttention::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return guarded<nvinfer1::IPluginV3*>("attachToContext", nullptr, [&] {
    std::unique_ptr<ClusteredHeadAttention> attached(new ClusteredHeadAttention(*this));
    // Always anew: another context may be on another GPU, which has yet to receive the kernels.
    attached->launcher_ = acquire_kernels(attributes_.kernels);
    return attached.release();
  });
}

const nvinfer1::PluginFieldCollection* ClusteredHeadAttention::getFieldsToSerialize() noexcept {
  return guarded<const nvinfer1::PluginFieldCollection*>("getFieldsToSerialize", nullptr, [&] {
    fields_ = serialised_fields(attributes_, op::kVersion);
    collection_.nbFields = static_cast<std::int32_t>(fields_.size());
    collection_.fields = fields_.data();
    return &collection_;
  });
}

}  // namespace chai::tensorrt
