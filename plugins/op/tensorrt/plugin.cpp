#include "op/tensorrt/plugin.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <stdexcept>
#include <tuple>
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
using cuda::Tensor;
using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr std::int32_t kSuccess = 0;
constexpr std::int32_t kFailure = 1;

using namespace op;  // kQuery, kOutput, …

constexpr std::size_t kNumInputs = std::size(op::kInputs);
constexpr std::size_t kNumOutputs = std::size(op::kOutputs);

// The input whose type and shape an output has; only `output` has a shape of its own.
constexpr std::array<std::size_t, kNumOutputs> kLikeInput = {kQuery,     kKeyCache,    kValueCache,
                                                             kKeyScales, kValueScales, kPastHeadMap};
constexpr std::array<std::size_t, 4> kPools = {kPresentKeyCache, kPresentValueCache, kPresentKeyScales,
                                               kPresentValueScales};

// What kernels call an input; the pools go by the outputs' addresses.
constexpr std::array<Tensor, kNumInputs> kTensorOf = {
    Tensor::kQuery,     Tensor::kKey,         Tensor::kValue,      Tensor::kKeyCache,    Tensor::kValueCache,
    Tensor::kKeyScales, Tensor::kValueScales, Tensor::kPageTable,  Tensor::kPastHeadMap, Tensor::kPastLengths,
    Tensor::kLengths,   Tensor::kSinks,       Tensor::kAlibiSlopes};

bool is_quantised(std::int64_t bits) {
  return bits == 8 || bits == 4;
}

bool has_input(const KernelSpec& spec, std::size_t input) {
  if (input == kKeyScales) return is_quantised(spec.key_bits);
  if (input == kValueScales) return is_quantised(spec.value_bits);
  if (input == kSinks) return spec.sinks;
  if (input == kAlibiSlopes) return spec.slopes;
  return true;
}

std::int64_t columns(std::int64_t bits, std::int64_t dim) {
  return bits == 4 ? dim / 2 : dim;
}

// Numbers per row beside the codes: scales, and in 4 bits minima.
std::int64_t scale_columns(std::int64_t bits, std::int64_t dim, std::int64_t group) {
  return dim / group * (bits == 4 ? 2 : 1);
}

DataType storage_type(std::int64_t bits, const std::string& dtype) {
  if (bits == 16) return DataType::kHALF;
  return is_quantised(bits) ? DataType::kINT8 : data_type(dtype);
}

std::size_t item_bytes(DataType type) {
  if (type == DataType::kINT8) return 1;
  return type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 2;
}

}  // namespace

ClusteredHeadAttention::ClusteredHeadAttention(Attributes attributes) : attributes_(std::move(attributes)) {
  program_ = std::make_shared<const Program>(Program::parse(attributes_.kernels->file(cuda::kIndexFile)));
  require_attributes();
  for (std::size_t i = 0; i < kNumInputs; ++i) {
    if (has_input(program_->spec(), i)) inputs_.push_back(i);
  }
  for (std::size_t i = 0; i < kNumOutputs; ++i) {
    if (has_input(program_->spec(), kLikeInput[i])) outputs_.push_back(i);
  }
  identity_ =
      std::string(kPluginName) + " " + kPluginVersion + " scale=" + std::to_string(attributes_.scale) +
      " probe_tokens=" + std::to_string(attributes_.probe_tokens) +
      " online=" + std::to_string(attributes_.online) + " key_bits=" + std::to_string(attributes_.key_bits) +
      " value_bits=" + std::to_string(attributes_.value_bits) +
      " group=" + std::to_string(attributes_.group) + " window=" + std::to_string(attributes_.window) +
      " softcap=" + std::to_string(attributes_.softcap) + " kernels=" + attributes_.kernels->hash();
}

void ClusteredHeadAttention::require_attributes() const {
  const KernelSpec& spec = program_->spec();
  const bool has_groups = is_quantised(spec.key_bits) || is_quantised(spec.value_bits);
  const std::array<std::tuple<const char*, std::int64_t, std::int64_t>, 5> constants = {
      {{"probe_tokens", spec.probe_tokens, attributes_.probe_tokens},
       {"key_bits", spec.key_bits, attributes_.key_bits},
       {"value_bits", spec.value_bits, attributes_.value_bits},
       {"group", has_groups ? spec.group : 0, has_groups ? attributes_.group : 0},
       {"a soft cap, 0 or 1:", spec.softcap ? 1 : 0, attributes_.softcap > 0.0f ? 1 : 0}}};
  for (const auto& [name, compiled, found] : constants) {
    if (compiled == found) continue;
    throw std::runtime_error("the kernels were compiled for " + std::string(name) + " " +
                             std::to_string(compiled) + " and the node has " + std::to_string(found) +
                             "; build again with `chai-export build --backend tensorrt`");
  }
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

void ClusteredHeadAttention::require_counts(std::int32_t num_inputs, std::int32_t num_outputs) const {
  if (num_inputs == static_cast<std::int32_t>(inputs_.size()) && num_outputs == getNbOutputs()) return;
  throw std::runtime_error("needs " + std::to_string(inputs_.size()) + " inputs and " +
                           std::to_string(outputs_.size()) + " outputs with these kernels, got " +
                           std::to_string(num_inputs) + " and " + std::to_string(num_outputs));
}

std::size_t ClusteredHeadAttention::place_of(std::size_t input) const {
  const auto found = std::find(inputs_.begin(), inputs_.end(), input);
  if (found == inputs_.end()) throw std::runtime_error(std::string(kInputs[input].name) + " is absent");
  return static_cast<std::size_t>(found - inputs_.begin());
}

DataType ClusteredHeadAttention::type_of(std::size_t input) const {
  const KernelSpec& spec = program_->spec();
  switch (kInputs[input].type) {
    case schema::Type::M:
      return DataType::kINT32;
    case schema::Type::K:
      return storage_type(spec.key_bits, spec.dtype);
    case schema::Type::V:
      return storage_type(spec.value_bits, spec.dtype);
    case schema::Type::F:
      return DataType::kHALF;
    case schema::Type::A:
      return DataType::kFLOAT;
    case schema::Type::T:
      break;
  }
  return data_type(spec.dtype);
}

// Read off without checking that they agree.
Symbols ClusteredHeadAttention::sizes_of(const std::vector<Dims>& dims) const {
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const schema::Parameter& input = kInputs[inputs_[i]];
    if (dims[i].nbDims == static_cast<std::int32_t>(input.rank)) continue;
    throw std::runtime_error(std::string(input.name) + " has shape " + text(dims[i]) + ", expected rank " +
                             std::to_string(input.rank));
  }
  const auto size = [&](std::size_t input, std::size_t axis) { return dims[place_of(input)].d[axis]; };
  Symbols sizes;
  sizes[Symbol::kB] = size(kQuery, 0);
  sizes[Symbol::kH] = size(kQuery, 1);
  sizes[Symbol::kS] = size(kQuery, 2);
  sizes[Symbol::kD] = size(kQuery, 3);
  sizes[Symbol::kG] = size(kKey, 1);
  sizes[Symbol::kDv] = size(kValue, 3);
  sizes[Symbol::kN] = size(kKeyCache, 0);
  sizes[Symbol::kR] = size(kKeyCache, 1);
  sizes[Symbol::kL] = size(kKeyCache, 2);
  sizes[Symbol::kC] = size(kPageTable, 1) * sizes[Symbol::kL];
  sizes[Symbol::kP] = attributes_.probe_tokens;
  sizes[Symbol::kOnline] = attributes_.online;
  sizes[Symbol::kWindow] = attributes_.window;
  return sizes;
}

// The largest sizes that a profile allows.
Symbols ClusteredHeadAttention::largest_sizes(const DynamicPluginTensorDesc* in) const {
  std::vector<Dims> dims;
  for (std::size_t i = 0; i < inputs_.size(); ++i) dims.push_back(in[i].max);
  return sizes_of(dims);
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
    throw std::runtime_error("key_cache keeps " + std::to_string(sizes[Symbol::kR]) +
                             " heads, allowed are 1 to " + std::to_string(spec.kv_heads));
  }
}

std::int32_t ClusteredHeadAttention::configurePlugin(const DynamicPluginTensorDesc* in,
                                                     std::int32_t num_inputs, const DynamicPluginTensorDesc*,
                                                     std::int32_t num_outputs) noexcept {
  return guarded("configurePlugin", kFailure, [&] {
    require_counts(num_inputs, num_outputs);
    require_compiled_for(largest_sizes(in));
    return kSuccess;
  });
}

std::int32_t ClusteredHeadAttention::getOutputDataTypes(DataType* output_types, std::int32_t num_outputs,
                                                        const DataType* input_types,
                                                        std::int32_t num_inputs) const noexcept {
  return guarded("getOutputDataTypes", kFailure, [&] {
    require_counts(num_inputs, num_outputs);
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      if (input_types[i] == type_of(inputs_[i])) continue;
      throw std::runtime_error(std::string(kInputs[inputs_[i]].name) +
                               " has another type than the kernels were compiled for");
    }
    for (std::size_t i = 0; i < outputs_.size(); ++i) output_types[i] = type_of(kLikeInput[outputs_[i]]);
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
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      const schema::Parameter& input = kInputs[inputs_[i]];
      if (inputs[i].nbDims == static_cast<std::int32_t>(input.rank)) continue;
      throw std::runtime_error(std::string(input.name) + " has rank " + std::to_string(inputs[i].nbDims) +
                               ", expected " + std::to_string(input.rank));
    }
    for (std::size_t i = 1; i < outputs_.size(); ++i) outputs[i] = inputs[place_of(kLikeInput[outputs_[i]])];
    nvinfer1::DimsExprs& attended = outputs[kOutput];
    attended.nbDims = 3;
    attended.d[0] = inputs[kQuery].d[0];
    attended.d[1] = inputs[kQuery].d[2];
    attended.d[2] =
        builder.operation(nvinfer1::DimensionOperation::kPROD, *inputs[kQuery].d[1], *inputs[kValue].d[3]);
    if (attended.d[2] == nullptr) throw std::runtime_error("TensorRT refuses the product of H and Dv");
    return kSuccess;
  });
}

bool ClusteredHeadAttention::supportsFormatCombination(std::int32_t position,
                                                       const DynamicPluginTensorDesc* in_out,
                                                       std::int32_t num_inputs,
                                                       std::int32_t num_outputs) noexcept {
  return guarded("supportsFormatCombination", false, [&] {
    require_counts(num_inputs, num_outputs);
    if (position < 0 || position >= num_inputs + num_outputs) return false;
    const std::size_t like =
        position < num_inputs ? inputs_[position] : kLikeInput[outputs_[position - num_inputs]];
    const PluginTensorDesc& desc = in_out[position].desc;
    return desc.format == TensorFormat::kLINEAR && desc.type == type_of(like);
  });
}

std::size_t ClusteredHeadAttention::getWorkspaceSize(const DynamicPluginTensorDesc* inputs,
                                                     std::int32_t num_inputs, const DynamicPluginTensorDesc*,
                                                     std::int32_t num_outputs) const noexcept {
  // There is no way to report an error here; with no workspace, enqueue reports one.
  return guarded<std::size_t>("getWorkspaceSize", 0, [&] {
    require_counts(num_inputs, num_outputs);
    return program_->workspace_bytes(largest_sizes(inputs));
  });
}

std::int32_t ClusteredHeadAttention::getAliasedInput(std::int32_t output_index) noexcept {
  return guarded("getAliasedInput", -1, [&] {
    if (output_index < 0 || output_index >= getNbOutputs()) return -1;
    const std::size_t output = outputs_[output_index];
    if (std::find(kPools.begin(), kPools.end(), output) == kPools.end()) return -1;
    return static_cast<std::int32_t>(place_of(kLikeInput[output]));
  });
}

Symbols ClusteredHeadAttention::checked_sizes(const PluginTensorDesc* in) const {
  std::vector<Dims> dims;
  for (std::size_t i = 0; i < inputs_.size(); ++i) dims.push_back(in[i].dims);
  const Symbols sizes = sizes_of(dims);
  require_compiled_for(sizes);
  const KernelSpec& spec = program_->spec();
  const std::int64_t b = sizes[Symbol::kB];
  const std::int64_t h = sizes[Symbol::kH];
  const std::int64_t g = sizes[Symbol::kG];
  const std::int64_t s = sizes[Symbol::kS];
  const std::int64_t d = sizes[Symbol::kD];
  const std::int64_t dv = sizes[Symbol::kDv];
  const std::int64_t n = sizes[Symbol::kN];
  const std::int64_t r = sizes[Symbol::kR];
  const std::int64_t l = sizes[Symbol::kL];
  if (b < 1 || s < 1 || n < 1 || sizes[Symbol::kC] < 1) {
    throw std::runtime_error("query " + text(dims[place_of(kQuery)]) + ", key_cache " +
                             text(dims[place_of(kKeyCache)]) + " or page_table " +
                             text(dims[place_of(kPageTable)]) + " is empty");
  }
  const std::int64_t group = std::max<std::int64_t>(spec.group, 1);
  const auto require = [&](std::size_t input, std::initializer_list<std::int64_t> wanted) {
    if (has_input(spec, input)) require_shape(kInputs[input].name, dims[place_of(input)], wanted);
  };
  require(kKey, {b, g, s, d});
  require(kValue, {b, g, s, dv});
  require(kKeyCache, {n, r, l, columns(spec.key_bits, d)});
  require(kValueCache, {n, g, l, columns(spec.value_bits, dv)});
  require(kKeyScales, {n, r, l, scale_columns(spec.key_bits, d, group)});
  require(kValueScales, {n, g, l, scale_columns(spec.value_bits, dv, group)});
  require(kPageTable, {b, sizes[Symbol::kC] / l});
  require(kPastHeadMap, {b, h});
  require(kPastLengths, {b});
  require(kLengths, {b});
  require(kSinks, {h});
  require(kAlibiSlopes, {h});
  return sizes;
}

const Plan& ClusteredHeadAttention::plan_for(const Symbols& sizes) {
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

void ClusteredHeadAttention::require_address(const char* name, const void* address, std::size_t input) const {
  if (address == nullptr) throw std::runtime_error(std::string(name) + " has no address");
  // What a layer takes from a table of all layers begins anywhere in it.
  const bool is_small = kInputs[input].type == schema::Type::M || input == kSinks || input == kAlibiSlopes;
  const std::size_t alignment = is_small ? item_bytes(type_of(input)) : program_->pointer_alignment();
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
  for (std::size_t i = 0; i < inputs_.size(); ++i)
    require_address(kInputs[inputs_[i]].name, inputs[i], inputs_[i]);
  for (std::size_t i = 0; i < outputs_.size(); ++i)
    require_address(kOutputs[outputs_[i]].name, outputs[i], kLikeInput[outputs_[i]]);
  if (workspace == nullptr && program_->workspace_bytes(sizes) > 0)
    throw std::runtime_error("called without workspace");
  // Not here, where a graph may be captured and others may be waiting for the stream.
  if (launcher_ == nullptr)
    throw std::runtime_error("called before attachToContext and onShapeChange, which load the kernels");

  cuda::Tensors tensors{};
  const auto at = [&](Tensor tensor) -> void*& { return tensors[static_cast<std::size_t>(tensor)]; };
  // Kernel arguments are not const; kernels only read what the op calls an input.
  for (std::size_t i = 0; i < inputs_.size(); ++i) at(kTensorOf[inputs_[i]]) = const_cast<void*>(inputs[i]);
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    if (outputs_[i] == kOutput) {
      at(Tensor::kOutput) = outputs[i];
    } else if (outputs_[i] == kPresentHeadMap) {
      at(Tensor::kPresentHeadMap) = outputs[i];
    } else {
      at(kTensorOf[kLikeInput[outputs_[i]]]) = outputs[i];  // a pool
    }
  }
  if (at(Tensor::kPresentHeadMap) == at(Tensor::kPastHeadMap)) {
    throw std::runtime_error(
        "past_head_map and present_head_map have one address; only the caches may be shared");
  }
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    if (std::find(kPools.begin(), kPools.end(), outputs_[i]) == kPools.end()) continue;
    const std::size_t from = place_of(kLikeInput[outputs_[i]]);
    if (outputs[i] == inputs[from]) continue;
    std::size_t bytes = item_bytes(in[from].type);
    for (std::int32_t axis = 0; axis < in[from].dims.nbDims; ++axis)
      bytes *= static_cast<std::size_t>(in[from].dims.d[axis]);
    launcher_->copy(outputs[i], inputs[from], bytes, stream);
  }
  const float scale =
      attributes_.scale != 0.0f ? attributes_.scale : 1.0f / std::sqrt(static_cast<float>(sizes[Symbol::kD]));
  cuda::run(plan_for(sizes), tensors, workspace, {scale, attributes_.softcap}, *launcher_, stream);
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
    fields_ = serialised_fields(attributes_);
    collection_.nbFields = static_cast<std::int32_t>(fields_.size());
    collection_.fields = fields_.data();
    return &collection_;
  });
}

}  // namespace chai::tensorrt
