// The plugin object without TensorRT: which tensors a form has, their types, addresses and launches.
#include "op/tensorrt/plugin.h"

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

using cuda::test::KernelDirectory;
using cuda::test::RecordingLauncher;
using nvinfer1::DataType;
using nvinfer1::TensorRTPhase;
using Plugin = ClusteredHeadAttention;

[[maybe_unused]] Logger& installed = Logger::install();

// Keys in 8 bits, values in 4, sinks and a soft cap, no slopes: H=4, G=2, D=16, Dv=8, groups of 8, P=5.
const std::string kIndex = R"({
  "format": "chai-kernels/2", "architecture": 90, "triton": "3.9.0",
  "spec": {"dtype": "float16", "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 16, "value_head_dim": 8,
           "probe_tokens": 5, "key_bits": 8, "value_bits": 4, "group_size": 8, "softcap": true, "sinks": true,
           "slopes": false},
  "pointer_alignment": 16, "workspace_alignment": 256,
  "workspace": [{"name": "scores", "type": "float32", "count": "B R * C *"}],
  "launches": [
    {"kernel": "several", "file": "several.cubin", "sha256": "SHA_SEVERAL", "when": "1 S <",
     "grid": ["S 4 cdiv", "H", "B"], "threads": 128, "shared_bytes": 0,
     "arguments": [{"type": "pointer", "tensor": "key_cache"}, {"type": "pointer", "tensor": "value_cache"},
                   {"type": "pointer", "tensor": "key_scales"}, {"type": "pointer", "tensor": "value_scales"},
                   {"type": "pointer", "tensor": "page_table"}, {"type": "pointer", "tensor": "sinks"},
                   {"type": "pointer", "tensor": "output"}, {"type": "pointer", "tensor": "present_head_map"}]},
    {"kernel": "one", "file": "one.cubin", "sha256": "SHA_ONE", "when": "S 1 ==",
     "grid": ["1", "R", "B"], "threads": 64, "shared_bytes": 0,
     "arguments": [{"type": "int32", "value": "N"}, {"type": "int32", "value": "L"},
                   {"type": "int32", "value": "C"}, {"type": "int32", "value": "window"},
                   {"type": "float32", "attribute": "scale"}, {"type": "float32", "attribute": "softcap"},
                   {"type": "pointer", "tensor": "past_lengths"}, {"type": "pointer", "tensor": "scores"}]}
  ]
})";

Attributes attributes() {
  Attributes result{0.0f, 5, 1, nullptr};
  result.key_bits = 8;
  result.value_bits = 4;
  result.group = 8;
  result.window = 40;
  result.softcap = 2.5f;
  return result;
}

std::unique_ptr<Plugin> create(const std::vector<nvinfer1::PluginField>& fields, TensorRTPhase phase) {
  ClusteredHeadAttentionCreator creator;
  const nvinfer1::PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
  return std::unique_ptr<Plugin>(static_cast<Plugin*>(creator.createPlugin("layer", &collection, phase)));
}

std::unique_ptr<Plugin> create(const Attributes& values = attributes(), const std::string& index = kIndex) {
  const KernelDirectory directory(index);
  return create(node_fields(directory.path(), values), TensorRTPhase::kBUILD);
}

// The twelve inputs: those of the op but for alibi_slopes. Two rows of seven tokens, three pages of 32
// positions.
std::vector<nvinfer1::PluginTensorDesc> inputs(std::int64_t tokens) {
  const auto make = [](DataType type, std::initializer_list<std::int64_t> sizes) {
    nvinfer1::PluginTensorDesc desc{};
    desc.type = type;
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    for (const std::int64_t size : sizes) desc.dims.d[desc.dims.nbDims++] = size;
    return desc;
  };
  constexpr DataType t = DataType::kHALF;
  constexpr DataType integer = DataType::kINT32;
  constexpr DataType codes = DataType::kINT8;
  return {make(t, {2, 4, tokens, 16}), make(t, {2, 2, tokens, 16}), make(t, {2, 2, tokens, 8}),
          make(codes, {9, 1, 32, 16}), make(codes, {9, 2, 32, 4}),  make(t, {9, 1, 32, 2}),
          make(t, {9, 2, 32, 2}),      make(integer, {2, 3}),       make(integer, {2, 4}),
          make(integer, {2}),          make(integer, {2}),          make(t, {4})};
}

std::vector<nvinfer1::DynamicPluginTensorDesc> all_tensors(std::int64_t tokens) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> result;
  const auto in = inputs(tokens);
  for (const auto& desc : in) {
    nvinfer1::DynamicPluginTensorDesc dynamic{};
    dynamic.desc = desc;
    dynamic.min = dynamic.opt = dynamic.max = desc.dims;
    result.push_back(dynamic);
  }
  for (const std::size_t like : {0, 3, 4, 5, 6, 8}) result.push_back(result[like]);
  return result;
}

constexpr std::int32_t kIn = 12;
constexpr std::int32_t kOut = 6;

struct Addresses {
  explicit Addresses(bool in_place) {
    for (std::size_t i = 0; i < kIn; ++i) in[i] = place(i + 1);
    for (std::size_t i = 0; i < kOut; ++i)
      out[i] = in_place && i > 0 && i < 5 ? place(i + 3) : place(100 + i);
  }
  static void* place(std::size_t number) { return reinterpret_cast<void*>(number << 20); }
  std::array<const void*, kIn> in{};
  std::array<void*, kOut> out{};
  void* workspace = place(200);
};

std::uint64_t number(const void* pointer) {
  return reinterpret_cast<std::uint64_t>(pointer);
}

TEST_CASE("a node has the tensors of its form, with their types") {
  auto plugin = create();
  REQUIRE(plugin != nullptr);
  CHECK(std::string(plugin->getPluginVersion()) == "2");
  CHECK(plugin->getNbOutputs() == kOut);
  const auto all = all_tensors(7);
  std::array<DataType, kIn> in{};
  std::array<DataType, kOut> out{};
  for (std::int32_t i = 0; i < kIn; ++i) in[i] = all[i].desc.type;
  CHECK(plugin->getOutputDataTypes(out.data(), kOut, in.data(), kIn) == 0);
  for (std::int32_t i = 0; i < kOut; ++i) CHECK(out[i] == all[kIn + i].desc.type);
  for (std::int32_t position = 0; position < kIn + kOut; ++position) {
    CAPTURE(position);
    auto combination = all;
    const auto supported = [&] {
      return plugin->supportsFormatCombination(position, combination.data(), kIn, kOut);
    };
    CHECK(supported());
    const DataType right = all[position].desc.type;
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kINT32, DataType::kINT8,
                                DataType::kUINT8, DataType::kBF16}) {
      combination[position].desc.type = type;
      CHECK(supported() == (type == right));
    }
    combination[position].desc.type = right;
    combination[position].desc.format = nvinfer1::TensorFormat::kCHW32;
    CHECK(!supported());
  }
  const std::array<std::int32_t, kOut> aliased = {-1, 3, 4, 5, 6, -1};
  for (std::int32_t i = 0; i < kOut; ++i) CHECK(plugin->getAliasedInput(i) == aliased[i]);
  CHECK(Logger::install().took_none());
  CHECK(plugin->getOutputDataTypes(out.data(), kOut, in.data(), kIn + 1) != 0);
  CHECK(Logger::install().took_error("needs 12 inputs and 6 outputs with these kernels, got 13 and 6"));
}

TEST_CASE("a form without scales and terms has fewer tensors") {
  std::string index = kIndex;
  const auto change = [&](const std::string& from, const std::string& to) {
    index.replace(index.find(from), from.size(), to);
  };
  change("\"key_bits\": 8", "\"key_bits\": 0");
  change("\"value_bits\": 4", "\"value_bits\": 16");
  change("\"sinks\": true", "\"sinks\": false");
  change("\"slopes\": false", "\"slopes\": true");
  Attributes values = attributes();
  values.key_bits = 0;
  values.value_bits = 16;
  auto plugin = create(values, index);
  REQUIRE(plugin != nullptr);
  CHECK((plugin->inputs() == std::vector<std::size_t>{0, 1, 2, 3, 4, 7, 8, 9, 10, 12}));
  CHECK((plugin->outputs() == std::vector<std::size_t>{0, 1, 2, 5}));
}

TEST_CASE("enqueue launches what the index lists, in place or on copies") {
  auto plugin = create();
  REQUIRE(plugin != nullptr);
  const auto recorder = std::make_shared<RecordingLauncher>(std::vector<std::size_t>{8, 8});
  plugin->use_launcher(recorder);
  const auto enqueue = [&](std::int64_t tokens, const Addresses& at) {
    const auto in = inputs(tokens);
    return plugin->enqueue(in.data(), nullptr, at.in.data(), at.out.data(), at.workspace, nullptr);
  };
  const Addresses shared(true);
  CHECK(enqueue(7, shared) == 0);
  CHECK(recorder->copies.empty());
  REQUIRE(recorder->launches.size() == 1);
  const auto& several = recorder->launches[0].arguments;
  for (std::size_t i = 0; i < 4; ++i) CHECK(several[i] == number(shared.in[3 + i]));
  CHECK(several[4] == number(shared.in[7]));
  CHECK(several[5] == number(shared.in[11]));
  CHECK(several[6] == number(shared.out[0]));
  CHECK(several[7] == number(shared.out[5]));

  const Addresses apart(false);
  CHECK(enqueue(1, apart) == 0);
  REQUIRE(recorder->copies.size() == 4);
  const std::array<std::size_t, 4> bytes = {9 * 32 * 16, 9 * 2 * 32 * 4, 9 * 32 * 2 * 2, 9 * 2 * 32 * 2 * 2};
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(recorder->copies[i].target == apart.out[1 + i]);
    CHECK(recorder->copies[i].source == apart.in[3 + i]);
    CHECK(recorder->copies[i].bytes == bytes[i]);
  }
  REQUIRE(recorder->launches.size() == 2);
  const auto& one = recorder->launches[1].arguments;
  CHECK(one[0] == 9);   // pages
  CHECK(one[1] == 32);  // positions per page
  CHECK(one[2] == 96);  // three pages a row
  CHECK(one[3] == 40);  // window
  float scale = 0.0f;
  float softcap = 0.0f;
  std::memcpy(&scale, &one[4], sizeof(scale));
  std::memcpy(&softcap, &one[5], sizeof(softcap));
  CHECK(scale == 0.25f);
  CHECK(softcap == 2.5f);
  CHECK(one[6] == number(apart.in[9]));
  CHECK(one[7] == number(apart.workspace));
  const auto all = all_tensors(1);
  CHECK(plugin->getWorkspaceSize(all.data(), kIn, all.data() + kIn, kOut) == 4 * 2 * 1 * 96);
  CHECK(plugin->configurePlugin(all.data(), kIn, all.data() + kIn, kOut) == 0);
  CHECK(Logger::install().took_none());
}

TEST_CASE("wrong shapes and addresses are refused by name and launch nothing") {
  auto plugin = create();
  REQUIRE(plugin != nullptr);
  const auto recorder = std::make_shared<RecordingLauncher>(std::vector<std::size_t>{8, 8});
  plugin->use_launcher(recorder);
  Logger& logger = Logger::install();
  const auto refused_shape = [&](const char* message, std::size_t input, std::int32_t axis,
                                 std::int64_t size) {
    CAPTURE(message);
    auto in = inputs(7);
    in[input].dims.d[axis] = size;
    const Addresses at(true);
    CHECK(plugin->enqueue(in.data(), nullptr, at.in.data(), at.out.data(), at.workspace, nullptr) != 0);
    CHECK(logger.took_error(message));
  };
  refused_shape("key_cache has shape [9,1,32,8], expected [9,1,32,16]", 3, 3, 8);
  refused_shape("value_cache has shape [9,2,32,8], expected [9,2,32,4]", 4, 3, 8);
  refused_shape("key_scales has shape [9,1,32,4], expected [9,1,32,2]", 5, 3, 4);
  refused_shape("value_scales has shape [8,2,32,2]", 6, 0, 8);
  refused_shape("page_table has shape [3,3], expected [2,3]", 7, 0, 3);
  refused_shape("sinks has shape [2], expected [4]", 11, 0, 2);
  refused_shape("key_cache keeps 3 heads", 3, 1, 3);
  refused_shape("is empty", 7, 1, 0);
  refused_shape("compiled for 4 query heads", 0, 1, 8);
  const auto refused = [&](const char* message, const std::function<void(Addresses&)>& spoil) {
    CAPTURE(message);
    Addresses at(true);
    spoil(at);
    const auto in = inputs(7);
    CHECK(plugin->enqueue(in.data(), nullptr, at.in.data(), at.out.data(), at.workspace, nullptr) != 0);
    CHECK(logger.took_error(message));
  };
  refused("key_scales has no address", [](Addresses& at) { at.in[5] = nullptr; });
  refused("present_value_scales has no address", [](Addresses& at) { at.out[4] = nullptr; });
  refused("key_cache does not start at a multiple of 16",
          [](Addresses& at) { at.in[3] = static_cast<const char*>(at.in[3]) + 8; });
  refused("past_head_map and present_head_map have one address",
          [](Addresses& at) { at.out[5] = const_cast<void*>(at.in[8]); });
  CHECK(recorder->launches.empty());
  CHECK(recorder->copies.empty());
}

TEST_CASE("attributes must be those that the kernels were compiled for") {
  Logger& logger = Logger::install();
  const auto refused = [&](const char* message, const std::function<void(Attributes&)>& change) {
    CAPTURE(message);
    Attributes values = attributes();
    change(values);
    CHECK(create(values) == nullptr);
    CHECK(logger.took_error(message));
  };
  refused("compiled for key_bits 8 and the node has 4", [](Attributes& a) { a.key_bits = 4; });
  refused("compiled for value_bits 4 and the node has 0", [](Attributes& a) { a.value_bits = 0; });
  refused("compiled for group 8 and the node has 32", [](Attributes& a) { a.group = 32; });
  refused("compiled for a soft cap, 0 or 1: 1 and the node has 0", [](Attributes& a) { a.softcap = 0.0f; });
  refused("field 'window' must not be negative", [](Attributes& a) { a.window = -1; });
  refused("field 'softcap' must be finite and not negative", [](Attributes& a) { a.softcap = -1.0f; });
  std::string index = kIndex;
  index.replace(index.find("chai-kernels/2"), 14, "chai-kernels/1");
  CHECK(create(attributes(), index) == nullptr);
  CHECK(logger.took_error("the kernel index has format 'chai-kernels/1' and this library reads"));
}

TEST_CASE("a restored plugin is the one that was serialised") {
  auto plugin = create();
  REQUIRE(plugin != nullptr);
  const auto* fields = plugin->getFieldsToSerialize();
  const std::vector<std::string> names = {"scale", "probe_tokens", "online",  "key_bits", "value_bits",
                                          "group", "window",       "softcap", "kernels"};
  REQUIRE(fields->nbFields == static_cast<std::int32_t>(names.size()));
  for (std::size_t i = 0; i < names.size(); ++i) CHECK(fields->fields[i].name == names[i]);
  const std::vector<nvinfer1::PluginField> copy(fields->fields, fields->fields + fields->nbFields);
  auto restored = create(copy, TensorRTPhase::kRUNTIME);
  REQUIRE(restored != nullptr);
  CHECK(std::string(restored->getMetadataString()) == plugin->getMetadataString());
  CHECK(std::string(restored->getMetadataString()).find("window=40") != std::string::npos);
}

TEST_CASE("output shapes are expressions of input shapes") {
  auto plugin = create();
  REQUIRE(plugin != nullptr);
  ExpressionBuilder builder;
  const std::vector<std::vector<std::string>> names = {{"B", "4", "S", "16"},
                                                       {"B", "2", "S", "16"},
                                                       {"B", "2", "S", "8"},
                                                       {"N", "R", "L", "16"},
                                                       {"N", "2", "L", "4"},
                                                       {"N", "R", "L", "2"},
                                                       {"N", "2", "L", "2"},
                                                       {"B", "M"},
                                                       {"B", "4"},
                                                       {"B"},
                                                       {"B"},
                                                       {"4"}};
  std::vector<nvinfer1::DimsExprs> in(kIn);
  for (std::size_t i = 0; i < names.size(); ++i) {
    for (const std::string& name : names[i]) in[i].d[in[i].nbDims++] = builder.symbol(name);
  }
  std::vector<nvinfer1::DimsExprs> out(kOut);
  CHECK(plugin->getOutputShapes(in.data(), kIn, nullptr, 0, out.data(), kOut, builder) == 0);
  const std::vector<std::vector<std::string>> expected = {{"B", "S", "(4*8)"},  {"N", "R", "L", "16"},
                                                          {"N", "2", "L", "4"}, {"N", "R", "L", "2"},
                                                          {"N", "2", "L", "2"}, {"B", "4"}};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    REQUIRE(out[i].nbDims == static_cast<std::int32_t>(expected[i].size()));
    for (std::size_t d = 0; d < expected[i].size(); ++d)
      CHECK(static_cast<const Expression*>(out[i].d[d])->text() == expected[i][d]);
  }
  in[3].nbDims = 3;
  CHECK(plugin->getOutputShapes(in.data(), kIn, nullptr, 0, out.data(), kOut, builder) != 0);
  CHECK(Logger::install().took_error("key_cache has rank 3"));
}

TEST_CASE("a launch that fails is an error") {
  auto plugin = create();
  REQUIRE(plugin != nullptr);
  const auto recorder = std::make_shared<RecordingLauncher>(std::vector<std::size_t>{8, 8});
  plugin->use_launcher(recorder);
  recorder->refuses = true;
  const auto in = inputs(7);
  const Addresses at(true);
  CHECK(plugin->enqueue(in.data(), nullptr, at.in.data(), at.out.data(), at.workspace, nullptr) != 0);
  CHECK(Logger::install().took_error("the recorder refuses"));
  CHECK(plugin->enqueue(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) != 0);
  CHECK(Logger::install().took_error("called without tensors"));
}

TEST_CASE("damaged kernels are refused with the layer's name") {
  Logger& logger = Logger::install();
  auto plugin = create();
  REQUIRE(plugin != nullptr);
  const auto* fields = plugin->getFieldsToSerialize();
  std::vector<nvinfer1::PluginField> damaged(fields->fields, fields->fields + fields->nbFields);
  --damaged.back().length;
  CHECK(create(damaged, TensorRTPhase::kRUNTIME) == nullptr);
  CHECK(logger.took_error("createPlugin: layer 'layer': the kernels in this engine are damaged"));
  const Attributes values = attributes();
  CHECK(create(node_fields("/nowhere", values), TensorRTPhase::kBUILD) == nullptr);
  CHECK(logger.took_error("createPlugin: layer 'layer': cannot read /nowhere/index.json"));
}

TEST_CASE("wrong fields are refused") {
  const KernelDirectory directory(kIndex);
  Logger& logger = Logger::install();
  const Attributes values = attributes();
  const auto good = node_fields(directory.path(), values);
  for (std::size_t missing = 0; missing < good.size(); ++missing) {
    auto fields = good;
    fields.erase(fields.begin() + static_cast<std::ptrdiff_t>(missing));
    CHECK(create(fields, TensorRTPhase::kBUILD) == nullptr);
    CHECK(logger.took_error("field '" + std::string(good[missing].name) + "' is missing"));
  }
  CHECK(create(good, TensorRTPhase::kRUNTIME) == nullptr);
  CHECK(logger.took_error("field 'kernels' is missing"));
  using Fields = std::vector<nvinfer1::PluginField>;
  const auto refused = [&](const char* message, const std::function<void(Fields&)>& spoil) {
    auto fields = good;
    spoil(fields);
    CHECK(create(fields, TensorRTPhase::kBUILD) == nullptr);
    CHECK(logger.took_error(message));
  };
  refused("unknown field 'scales'", [](Fields& f) { f[0].name = "scales"; });
  refused("field 'scale' is given twice", [](Fields& f) { f.push_back(f[0]); });
  refused("has the wrong type", [](Fields& f) { f[1].type = nvinfer1::PluginFieldType::kFLOAT32; });
  refused("must hold one value", [](Fields& f) { f[1].length = 2; });
  refused("must hold one value", [](Fields& f) { f[2].data = nullptr; });
  refused("is empty", [](Fields& f) { f.back().length = 0; });
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
  REQUIRE(plugin != nullptr);
  Logger& logger = Logger::install();
  const auto in = inputs(7);
  const Addresses at(true);
  const auto enqueue = [&] {
    return plugin->enqueue(in.data(), nullptr, at.in.data(), at.out.data(), at.workspace, nullptr);
  };
  CHECK(enqueue() != 0);
  CHECK(
      logger.took_error("enqueue: called before attachToContext and onShapeChange, which load the kernels"));
  // There is no TensorRT here to load them.
  CHECK(plugin->onShapeChange(in.data(), kIn, nullptr, kOut) != 0);
  CHECK(logger.took_error("onShapeChange: no TensorRT library is loaded in this process"));
  CHECK(plugin->attachToContext(nullptr) == nullptr);
  CHECK(logger.took_error("attachToContext: no TensorRT library is loaded in this process"));
  const auto recorder = std::make_shared<RecordingLauncher>(std::vector<std::size_t>{8, 8});
  plugin->use_launcher(recorder);
  CHECK(plugin->onShapeChange(in.data(), kIn, nullptr, kOut) == 0);
  CHECK(enqueue() == 0);
  CHECK(recorder->launches.size() == 1);
}

TEST_CASE("a thousand plugins leave nothing behind") {
  const KernelDirectory directory(kIndex);
  const Attributes values = attributes();
  const auto fields = node_fields(directory.path(), values);
  for (int i = 0; i < 1000; ++i) {
    auto plugin = create(fields, TensorRTPhase::kBUILD);
    std::unique_ptr<nvinfer1::IPluginV3> clone(plugin->clone());
    plugin->getFieldsToSerialize();
    plugin.reset();
    CHECK(static_cast<Plugin*>(clone.get())->getFieldsToSerialize() != nullptr);
  }
}

}  // namespace
}  // namespace chai::tensorrt::test
