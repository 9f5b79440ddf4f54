// The plugin object without TensorRT: what its Python bindings cannot reach.
#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "op/tensorrt/creator.h"
#include "tests/op/cuda/fixtures.h"
#include "tests/op/tensorrt/fixtures.h"

namespace chai::tensorrt::test {
namespace {

using cuda::test::kArgumentCounts;
using cuda::test::KernelDirectory;
using cuda::test::RecordingLauncher;
using nvinfer1::DataType;
using nvinfer1::TensorRTPhase;

[[maybe_unused]] Logger& installed = Logger::install();
const Attributes kAttributes{0.0f, 5, 1, nullptr};

std::unique_ptr<ClusteredHeadAttention> create(const std::vector<nvinfer1::PluginField>& fields,
                                               TensorRTPhase phase) {
  ClusteredHeadAttentionCreator creator;
  const nvinfer1::PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
  auto* plugin = creator.createPlugin("layer", &collection, phase);
  return std::unique_ptr<ClusteredHeadAttention>(static_cast<ClusteredHeadAttention*>(plugin));
}

std::unique_ptr<ClusteredHeadAttention> create(const Attributes& attributes = kAttributes) {
  const KernelDirectory directory;
  return create(node_fields(directory.path(), attributes), TensorRTPhase::kBUILD);
}

// A tensor per input and output, far apart and aligned; nothing is stored at these addresses.
struct Addresses {
  explicit Addresses(bool in_place) {
    for (std::size_t i = 0; i < inputs.size(); ++i) inputs[i] = place(i + 1);
    for (std::size_t i = 0; i < outputs.size(); ++i) outputs[i] = place(100 + i);
    if (in_place) {
      outputs[1] = place(4);
      outputs[2] = place(5);
    }
  }
  static void* place(std::size_t number) { return reinterpret_cast<void*>(number << 20); }

  std::vector<const void*> inputs = std::vector<const void*>(kNumInputs);
  std::vector<void*> outputs = std::vector<void*>(kNumOutputs);
  void* workspace = place(200);
};

std::uint64_t address(const void* pointer) {
  return reinterpret_cast<std::uint64_t>(pointer);
}

std::int32_t enqueue(ClusteredHeadAttention& plugin, const Call& call, const Addresses& at) {
  const auto inputs = call.inputs();
  return plugin.enqueue(inputs.data(), nullptr, at.inputs.data(), at.outputs.data(), at.workspace, nullptr);
}

TEST_CASE("output shapes are expressions of input shapes") {
  auto plugin = create();
  ExpressionBuilder builder;
  const std::vector<std::vector<std::string>> names = {{"B", "4", "S", "16"},
                                                       {"B", "2", "S", "16"},
                                                       {"B", "2", "S", "8"},
                                                       {"B", "R", "C", "16"},
                                                       {"B", "2", "C", "8"},
                                                       {"B", "4"},
                                                       {"B"},
                                                       {"B"}};
  std::vector<nvinfer1::DimsExprs> inputs(kNumInputs);
  for (std::size_t i = 0; i < names.size(); ++i) {
    for (const std::string& name : names[i]) inputs[i].d[inputs[i].nbDims++] = builder.symbol(name);
  }
  std::vector<nvinfer1::DimsExprs> outputs(kNumOutputs);
  CHECK(plugin->getOutputShapes(inputs.data(), kNumInputs, nullptr, 0, outputs.data(), kNumOutputs,
                                builder) == 0);
  const std::vector<std::vector<std::string>> expected = {
      {"B", "S", "(4*8)"}, {"B", "R", "C", "16"}, {"B", "2", "C", "8"}, {"B", "4"}};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(outputs[i].nbDims == static_cast<std::int32_t>(expected[i].size()));
    for (std::size_t d = 0; d < expected[i].size(); ++d) {
      CHECK(static_cast<const Expression*>(outputs[i].d[d])->text() == expected[i][d]);
    }
  }
  inputs[3].nbDims = 3;
  CHECK(plugin->getOutputShapes(inputs.data(), kNumInputs, nullptr, 0, outputs.data(), kNumOutputs,
                                builder) != 0);
  CHECK(Logger::install().took_error("past_key has rank 3"));
}

TEST_CASE("workspace is what the index says") {
  auto plugin = create();
  Call call;
  const auto descriptions = call.dynamic();
  // plan: 2*2 int32; weights: 2*64 float16; each rounded up to 256 bytes.
  CHECK(plugin->getWorkspaceSize(descriptions.data(), kNumInputs, descriptions.data() + kNumInputs,
                                 kNumOutputs) == 512);
  CHECK(plugin->configurePlugin(descriptions.data(), kNumInputs, descriptions.data() + kNumInputs,
                                kNumOutputs) == 0);
  call.kept = 3;
  const auto too_many = call.dynamic();
  CHECK(plugin->configurePlugin(too_many.data(), kNumInputs, too_many.data() + kNumInputs, kNumOutputs) != 0);
  CHECK(Logger::install().took_error("keeps 3 heads"));
}

TEST_CASE("only linear tensors of the compiled types are accepted") {
  auto plugin = create();
  const Call call;
  for (std::int32_t position = 0; position < kNumInputs + kNumOutputs; ++position) {
    auto combination = call.dynamic();
    const auto supported = [&] {
      return plugin->supportsFormatCombination(position, combination.data(), kNumInputs, kNumOutputs);
    };
    CHECK(supported());
    const DataType right = combination[position].desc.type;
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT32,
                                DataType::kINT8, DataType::kINT64, DataType::kBOOL}) {
      combination[position].desc.type = type;
      CHECK(supported() == (type == right));
    }
    combination[position].desc.type = right;
    combination[position].desc.format = nvinfer1::TensorFormat::kCHW4;
    CHECK(!supported());
  }
  auto combination = call.dynamic();
  CHECK(!plugin->supportsFormatCombination(12, combination.data(), kNumInputs, kNumOutputs));
  CHECK(!plugin->supportsFormatCombination(-1, combination.data(), kNumInputs, kNumOutputs));
}

TEST_CASE("enqueue launches what the index lists") {
  auto plugin = create();
  const auto recorder = std::make_shared<RecordingLauncher>(kArgumentCounts);
  plugin->use_launcher(recorder);

  Call prefill;
  const Addresses shared(true);
  CHECK(enqueue(*plugin, prefill, shared) == 0);
  CHECK(recorder->copies.empty());
  CHECK(recorder->launches.size() == 1);
  const auto& several = recorder->launches[0];
  CHECK(several.kernel == 0);
  CHECK((several.size.grid == std::array<std::uint32_t, 3>{2, 4, 2}));
  CHECK(several.size.threads == 128);
  CHECK(several.size.shared_bytes == 70000);
  CHECK(several.arguments[0] == address(shared.inputs[0]));
  CHECK(several.arguments[1] == address(shared.workspace) + 256);
  CHECK(several.arguments[2] == 64);
  float scale = 0.0f;
  std::memcpy(&scale, &several.arguments[3], sizeof(scale));
  CHECK(scale == 0.25f);  // 1/sqrt(16)
  CHECK(several.arguments[4] == address(shared.inputs[3]));
  CHECK(several.arguments[5] == 0);

  Call decode;
  decode.tokens = 1;
  const Addresses distinct(false);
  CHECK(enqueue(*plugin, decode, distinct) == 0);
  CHECK(recorder->launches.size() == 2);
  const auto& one = recorder->launches[1];
  CHECK(one.kernel == 1);
  CHECK((one.size.grid == std::array<std::uint32_t, 3>{8, 1, 2}));
  CHECK(one.arguments[0] == address(distinct.workspace));
  CHECK(one.arguments[1] == 1);
  CHECK(one.arguments[2] == address(distinct.outputs[3]));
  CHECK(recorder->copies.size() == 2);
  CHECK(recorder->copies[0].target == distinct.outputs[1]);
  CHECK(recorder->copies[0].source == distinct.inputs[3]);
  CHECK(recorder->copies[0].bytes == 2 * 1 * 64 * 16 * 2);
  CHECK(recorder->copies[1].bytes == 2 * 2 * 64 * 8 * 2);

  auto scaled = create(Attributes{0.75f, 5, 1, nullptr});
  scaled->use_launcher(recorder);
  CHECK(enqueue(*scaled, prefill, shared) == 0);
  std::memcpy(&scale, &recorder->launches.back().arguments[3], sizeof(scale));
  CHECK(scale == 0.75f);
  recorder->launches.pop_back();

  // Another number of kept heads on the same object: the plan follows the shape.
  decode.kept = 2;
  CHECK(enqueue(*plugin, decode, shared) == 0);
  CHECK((recorder->launches[2].size.grid == std::array<std::uint32_t, 3>{4, 2, 2}));
  CHECK(recorder->launches[2].arguments[1] == 0);
  CHECK(Logger::install().took_none());
}

TEST_CASE("enqueue refuses wrong calls and launches nothing") {
  auto plugin = create();
  const auto recorder = std::make_shared<RecordingLauncher>(kArgumentCounts);
  plugin->use_launcher(recorder);
  Logger& logger = Logger::install();
  const Call call;
  const auto refused = [&](const char* message, const std::function<void(Addresses&)>& spoil) {
    Addresses at(true);
    spoil(at);
    CHECK(enqueue(*plugin, call, at) != 0);
    CHECK(logger.took_error(message));
  };
  refused("value has no address", [](Addresses& at) { at.inputs[2] = nullptr; });
  refused("present_value has no address", [](Addresses& at) { at.outputs[2] = nullptr; });
  refused("called without workspace", [](Addresses& at) { at.workspace = nullptr; });
  refused("past_head_map and present_head_map have one address",
          [](Addresses& at) { at.outputs[3] = const_cast<void*>(at.inputs[5]); });
  refused("query does not start at a multiple of 16",
          [](Addresses& at) { at.inputs[0] = static_cast<const char*>(at.inputs[0]) + 2; });
  // A layer's map may lie at any multiple of four bytes inside a block of maps.
  Addresses unaligned_map(true);
  unaligned_map.inputs[5] = static_cast<const char*>(unaligned_map.inputs[5]) + 20;
  CHECK(enqueue(*plugin, call, unaligned_map) == 0);
  recorder->launches.clear();
  CHECK(plugin->enqueue(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) != 0);
  CHECK(logger.took_error("called without tensors"));

  const auto refused_shape = [&](const char* message, std::size_t input, std::int32_t axis,
                                 std::int64_t size) {
    auto inputs = call.inputs();
    inputs[input].dims.d[axis] = size;
    const Addresses at(true);
    CHECK(plugin->enqueue(inputs.data(), nullptr, at.inputs.data(), at.outputs.data(), at.workspace,
                          nullptr) != 0);
    CHECK(logger.took_error(message));
    CHECK(plugin->onShapeChange(inputs.data(), kNumInputs, nullptr, kNumOutputs) != 0);
    CHECK(logger.took_error(message));
  };
  refused_shape("compiled for 4 query heads", 0, 1, 8);
  refused_shape("compiled for 2 KV heads", 1, 1, 4);
  refused_shape("compiled for 16 head dim", 0, 3, 32);
  refused_shape("compiled for 8 value head dim", 2, 3, 16);
  refused_shape("key has shape [2,2,6,16], expected [2,2,7,16]", 1, 2, 6);
  refused_shape("keeps 3 heads", 3, 1, 3);
  refused_shape("past_value has shape [2,2,32,8], expected [2,2,64,8]", 4, 2, 32);
  refused_shape("past_head_map has shape [2,3]", 5, 1, 3);
  refused_shape("lengths has shape [1], expected [2]", 7, 0, 1);
  CHECK(recorder->launches.empty());
  CHECK(recorder->copies.empty());

  recorder->refuses = true;
  CHECK(enqueue(*plugin, call, Addresses(true)) != 0);
  CHECK(logger.took_error("the recorder refuses"));
}

TEST_CASE("a restored plugin is the one that was serialised") {
  Attributes attributes{0.35f, 5, 0, nullptr};
  auto plugin = create(attributes);
  std::unique_ptr<nvinfer1::IPluginV3> clone(plugin->clone());
  auto* cloned = static_cast<ClusteredHeadAttention*>(clone.get());
  const std::string identity = plugin->getMetadataString();
  const auto* fields = plugin->getFieldsToSerialize();
  const std::vector<std::string> names = {"scale", "probe_tokens", "online", "kernels"};
  CHECK(fields->nbFields == static_cast<std::int32_t>(names.size()));
  for (std::size_t i = 0; i < names.size(); ++i) CHECK(fields->fields[i].name == names[i]);
  const std::vector<nvinfer1::PluginField> copy(fields->fields, fields->fields + fields->nbFields);
  auto restored = create(copy, TensorRTPhase::kRUNTIME);
  CHECK(restored != nullptr);
  for (ClusteredHeadAttention* other : {cloned, restored.get()}) {
    CHECK(identity == other->getMetadataString());
    const auto* again = other->getFieldsToSerialize();
    CHECK(again->nbFields == fields->nbFields);
    for (std::int32_t i = 0; i < fields->nbFields; ++i) {
      CHECK(std::strcmp(again->fields[i].name, fields->fields[i].name) == 0);
      CHECK(again->fields[i].type == fields->fields[i].type);
      CHECK(again->fields[i].length == fields->fields[i].length);
      const bool is_bytes = fields->fields[i].type == nvinfer1::PluginFieldType::kUNKNOWN;
      const std::size_t bytes = is_bytes ? static_cast<std::size_t>(fields->fields[i].length) : 4;
      CHECK(std::memcmp(again->fields[i].data, fields->fields[i].data, bytes) == 0);
    }
  }
  // The clone outlives what it was cloned from.
  plugin.reset();
  CHECK(identity == cloned->getMetadataString());
  CHECK(cloned->getFieldsToSerialize()->nbFields == static_cast<std::int32_t>(names.size()));
}

TEST_CASE("damaged kernels are refused with the layer's name") {
  Logger& logger = Logger::install();
  auto plugin = create();
  const auto* fields = plugin->getFieldsToSerialize();
  std::vector<nvinfer1::PluginField> damaged(fields->fields, fields->fields + fields->nbFields);
  --damaged.back().length;
  CHECK(create(damaged, TensorRTPhase::kRUNTIME) == nullptr);
  CHECK(logger.took_error("createPlugin: layer 'layer': the kernels in this engine are damaged"));
  CHECK(create(node_fields("/nowhere", kAttributes), TensorRTPhase::kBUILD) == nullptr);
  CHECK(logger.took_error("createPlugin: layer 'layer': cannot read /nowhere/index.json"));
}

TEST_CASE("wrong fields are refused") {
  const KernelDirectory directory;
  Logger& logger = Logger::install();
  const auto good = node_fields(directory.path(), kAttributes);
  for (std::size_t missing = 0; missing < good.size(); ++missing) {
    auto fields = good;
    fields.erase(fields.begin() + static_cast<std::ptrdiff_t>(missing));
    CHECK(create(fields, TensorRTPhase::kBUILD) == nullptr);
    CHECK(logger.took_error("field '" + std::string(good[missing].name) + "' is missing"));
  }
  CHECK(create(good, TensorRTPhase::kRUNTIME) == nullptr);
  CHECK(logger.took_error("field 'kernels' is missing"));
  const auto refused = [&](const char* message,
                           const std::function<void(std::vector<nvinfer1::PluginField>&)>& spoil) {
    auto fields = good;
    spoil(fields);
    CHECK(create(fields, TensorRTPhase::kBUILD) == nullptr);
    CHECK(logger.took_error(message));
  };
  using Fields = std::vector<nvinfer1::PluginField>;
  refused("unknown field 'scales'", [](Fields& f) { f[0].name = "scales"; });
  refused("field 'scale' is given twice", [](Fields& f) { f.push_back(f[0]); });
  refused("has the wrong type", [](Fields& f) { f[1].type = nvinfer1::PluginFieldType::kFLOAT32; });
  refused("must hold one value", [](Fields& f) { f[1].length = 2; });
  refused("must hold one value", [](Fields& f) { f[2].data = nullptr; });
  refused("is empty", [](Fields& f) { f[3].length = 0; });
  const std::int32_t two = 2;
  const std::int32_t zero = 0;
  const float infinite = std::numeric_limits<float>::infinity();
  refused("must be 0 or 1", [&](Fields& f) { f[2].data = &two; });
  refused("must be at least 1", [&](Fields& f) { f[1].data = &zero; });
  refused("compiled for probe_tokens 5 and the node has 2", [&](Fields& f) { f[1].data = &two; });
  refused("must be finite", [&](Fields& f) { f[0].data = &infinite; });
  ClusteredHeadAttentionCreator creator;
  CHECK(creator.createPlugin(nullptr, nullptr, TensorRTPhase::kBUILD) == nullptr);
  CHECK(logger.took_error("no fields were given"));
}

TEST_CASE("kernels are loaded before enqueue, never in it") {
  auto plugin = create();
  Logger& logger = Logger::install();
  const Call call;
  const auto inputs = call.inputs();
  CHECK(enqueue(*plugin, call, Addresses(true)) != 0);
  CHECK(
      logger.took_error("enqueue: called before attachToContext and onShapeChange, which load the kernels"));
  // There is no TensorRT here to load them.
  CHECK(plugin->onShapeChange(inputs.data(), kNumInputs, nullptr, kNumOutputs) != 0);
  CHECK(logger.took_error("onShapeChange: no TensorRT library is loaded in this process"));
  const auto recorder = std::make_shared<RecordingLauncher>(kArgumentCounts);
  plugin->use_launcher(recorder);
  CHECK(plugin->onShapeChange(inputs.data(), kNumInputs, nullptr, kNumOutputs) == 0);
  CHECK(enqueue(*plugin, call, Addresses(true)) == 0);
  CHECK(recorder->launches.size() == 1);
}

TEST_CASE("a plugin without a GPU says so") {
  auto plugin = create();
  CHECK(plugin->attachToContext(nullptr) == nullptr);
  CHECK(Logger::install().took_error("attachToContext: no TensorRT library is loaded in this process"));
}

TEST_CASE("a thousand plugins leave nothing behind") {
  const KernelDirectory directory;
  const auto fields = node_fields(directory.path(), kAttributes);
  for (int i = 0; i < 1000; ++i) {
    auto plugin = create(fields, TensorRTPhase::kBUILD);
    std::unique_ptr<nvinfer1::IPluginV3> clone(plugin->clone());
    plugin->getFieldsToSerialize();
    plugin.reset();
    CHECK(static_cast<ClusteredHeadAttention*>(clone.get())->getFieldsToSerialize() != nullptr);
  }
}

}  // namespace
}  // namespace chai::tensorrt::test
