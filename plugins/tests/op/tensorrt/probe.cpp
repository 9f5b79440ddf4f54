// Calls a plugin's C++ interface for tests/parity/test_tensorrt_plugin.py: TensorRT's Python bindings declare
// these methods but do not forward them to a plugin that is written in C++. Plain C functions for ctypes.
#include <NvInferRuntime.h>

#include <cstdint>
#include <cstring>
#include <vector>

#define PROBE extern "C" __attribute__((visibility("default")))

namespace {

nvinfer1::IPluginCreatorV3One* creator(nvinfer1::IPluginRegistry* registry) {
  return static_cast<nvinfer1::IPluginCreatorV3One*>(
      registry->getCreator("ClusteredHeadAttention", "2", "chai"));
}

nvinfer1::IPluginV3OneBuild* build(nvinfer1::IPluginV3* plugin) {
  return static_cast<nvinfer1::IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}

nvinfer1::IPluginV3OneRuntime* runtime(nvinfer1::IPluginV3* plugin) {
  return static_cast<nvinfer1::IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

const nvinfer1::PluginFieldCollection* serialised(nvinfer1::IPluginV3* plugin) {
  return runtime(plugin)->getFieldsToSerialize();
}

nvinfer1::Dims read_dims(const std::int64_t* sizes) {
  nvinfer1::Dims dims{};
  while (dims.nbDims < 4 && sizes[dims.nbDims] > 0) {
    dims.d[dims.nbDims] = sizes[dims.nbDims];
    ++dims.nbDims;
  }
  return dims;
}

}  // namespace

// `integers`: probe_tokens, online, key_bits, value_bits, group, window. `floats`: scale, softcap.
PROBE nvinfer1::IPluginV3* probe_create(nvinfer1::IPluginRegistry* registry, const char* directory,
                                        const std::int32_t* integers, const float* floats) {
  using nvinfer1::PluginFieldType;
  std::vector<nvinfer1::PluginField> fields = {{"scale", floats, PluginFieldType::kFLOAT32, 1},
                                               {"softcap", floats + 1, PluginFieldType::kFLOAT32, 1},
                                               {"kernel_directory", directory, PluginFieldType::kCHAR,
                                                static_cast<std::int32_t>(std::strlen(directory))}};
  for (const char* name : {"probe_tokens", "online", "key_bits", "value_bits", "group", "window"})
    fields.push_back({name, integers++, PluginFieldType::kINT32, 1});
  const nvinfer1::PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
  return creator(registry)->createPlugin("probe", &collection, nvinfer1::TensorRTPhase::kBUILD);
}

// What TensorRT does when an engine is loaded: the fields, copied, and a new object from them.
PROBE nvinfer1::IPluginV3* probe_restore(nvinfer1::IPluginRegistry* registry, nvinfer1::IPluginV3* plugin) {
  const nvinfer1::PluginFieldCollection* original = serialised(plugin);
  std::vector<nvinfer1::PluginField> fields(original->fields, original->fields + original->nbFields);
  std::vector<std::vector<char>> contents;
  for (nvinfer1::PluginField& field : fields) {
    const std::size_t bytes =
        static_cast<std::size_t>(field.length) * (field.type == nvinfer1::PluginFieldType::kUNKNOWN ? 1 : 4);
    const auto* data = static_cast<const char*>(field.data);
    field.data = contents.emplace_back(data, data + bytes).data();
  }
  const nvinfer1::PluginFieldCollection collection{original->nbFields, fields.data()};
  return creator(registry)->createPlugin("probe", &collection, nvinfer1::TensorRTPhase::kRUNTIME);
}

PROBE nvinfer1::IPluginV3* probe_clone(nvinfer1::IPluginV3* plugin) {
  return plugin->clone();
}

PROBE void probe_destroy(nvinfer1::IPluginV3* plugin) {
  delete plugin;
}

// Field i of what is serialised; returns how many there are.
PROBE std::int32_t probe_field(nvinfer1::IPluginV3* plugin, std::int32_t i, const char** name,
                               std::int32_t* type, std::int32_t* length, const void** data) {
  const nvinfer1::PluginFieldCollection* fields = serialised(plugin);
  if (i < fields->nbFields) {
    *name = fields->fields[i].name;
    *type = static_cast<std::int32_t>(fields->fields[i].type);
    *length = fields->fields[i].length;
    *data = fields->fields[i].data;
  }
  return fields->nbFields;
}

PROBE std::int32_t probe_supports(nvinfer1::IPluginV3* plugin, std::int32_t position,
                                  const std::int32_t* types, const std::int32_t* formats,
                                  std::int32_t num_inputs, std::int32_t num_outputs) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> all(static_cast<std::size_t>(num_inputs + num_outputs));
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i].desc.type = static_cast<nvinfer1::DataType>(types[i]);
    all[i].desc.format = static_cast<nvinfer1::TensorFormat>(formats[i]);
  }
  return build(plugin)->supportsFormatCombination(position, all.data(), num_inputs, num_outputs) ? 1 : 0;
}

// The clone that TensorRT makes for an execution context.
PROBE nvinfer1::IPluginV3* probe_attach(nvinfer1::IPluginV3* plugin) {
  return runtime(plugin)->attachToContext(nullptr);
}

// `dims` as for probe_workspace; `types` are DataTypes of the inputs.
PROBE std::int32_t probe_enqueue(nvinfer1::IPluginV3* plugin, const std::int64_t* dims,
                                 const std::int32_t* types, std::int32_t num_inputs,
                                 const void* const* inputs, void* const* outputs, void* workspace,
                                 cudaStream_t stream) {
  std::vector<nvinfer1::PluginTensorDesc> in(static_cast<std::size_t>(num_inputs));
  for (std::int32_t i = 0; i < num_inputs; ++i) {
    in[i].dims = read_dims(dims + 4 * i);
    in[i].type = static_cast<nvinfer1::DataType>(types[i]);
    in[i].format = nvinfer1::TensorFormat::kLINEAR;
  }
  return runtime(plugin)->enqueue(in.data(), nullptr, inputs, outputs, workspace, stream);
}

PROBE std::int32_t probe_num_outputs(nvinfer1::IPluginV3* plugin) {
  return build(plugin)->getNbOutputs();
}

PROBE std::int32_t probe_output_types(nvinfer1::IPluginV3* plugin, const std::int32_t* inputs,
                                      std::int32_t num_inputs, std::int32_t* outputs,
                                      std::int32_t num_outputs) {
  std::vector<nvinfer1::DataType> in;
  for (std::int32_t i = 0; i < num_inputs; ++i) in.push_back(static_cast<nvinfer1::DataType>(inputs[i]));
  std::vector<nvinfer1::DataType> out(static_cast<std::size_t>(num_outputs));
  const std::int32_t status =
      build(plugin)->getOutputDataTypes(out.data(), num_outputs, in.data(), num_inputs);
  for (std::int32_t i = 0; i < num_outputs; ++i) outputs[i] = static_cast<std::int32_t>(out[i]);
  return status;
}

// `dims` holds four numbers for each input, 0 past its rank.
PROBE std::int64_t probe_workspace(nvinfer1::IPluginV3* plugin, const std::int64_t* dims,
                                   std::int32_t num_inputs, std::int32_t num_outputs) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> all(static_cast<std::size_t>(num_inputs + num_outputs));
  for (std::int32_t i = 0; i < num_inputs; ++i) {
    all[i].min = all[i].opt = all[i].desc.dims = all[i].max = read_dims(dims + 4 * i);
  }
  return static_cast<std::int64_t>(
      build(plugin)->getWorkspaceSize(all.data(), num_inputs, all.data() + num_inputs, num_outputs));
}
