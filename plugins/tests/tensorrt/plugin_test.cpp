// The plugin object without TensorRT: what its Python bindings cannot reach.
#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "creator.h"
#include "fixtures.h"
#include "formula.h"
#include "json.h"
#include "kernel_image.h"
#include "sha256.h"

namespace chai::tensorrt::test {
namespace {

using nvinfer1::DataType;
using nvinfer1::TensorRTPhase;

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

std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

std::int32_t enqueue(ClusteredHeadAttention& plugin, const Call& call, const Addresses& at) {
  const auto inputs = call.inputs();
  return plugin.enqueue(inputs.data(), nullptr, at.inputs.data(), at.outputs.data(), at.workspace, nullptr);
}

void sha256_knows_its_test_vectors() {
  CHECK(sha256_hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256_hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256_hex(std::string(64, 'a')) ==
        "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb");
  CHECK(sha256_hex(std::string(1000, 'x')).size() == 64);
}

void formulas_evaluate_as_python_does() {
  Symbols symbols;
  symbols[Symbol::kS] = 130;
  symbols[Symbol::kB] = 3;
  symbols[Symbol::kOnline] = 1;
  const std::map<std::string, std::int64_t> values = {
      {"S 64 cdiv", 3},     {"S B -", 127}, {"1 S <", 1},         {"S 1 ==", 0},
      {"S B min 7 max", 7}, {"-5 B +", -2}, {"online 1 B < *", 1}};
  for (const auto& [text, value] : values) CHECK(Formula(text).evaluate(symbols) == value);
  for (const char* wrong : {"", "S B", "S +", "S B /", "X", "1 2 + +", "9999999999999999999999"}) {
    bool refused = false;
    try {
      Formula formula(wrong);
    } catch (const std::runtime_error&) {
      refused = true;
    }
    CHECK(refused);
  }
  for (const char* wrong : {"S 0 cdiv", "9223372036854775807 B *"}) {
    bool refused = false;
    try {
      Formula(wrong).evaluate(symbols);
    } catch (const std::runtime_error&) {
      refused = true;
    }
    CHECK(refused);
  }
}

void output_shapes_are_expressions_of_input_shapes() {
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

void workspace_is_what_the_index_says() {
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

void only_linear_tensors_of_the_compiled_types_are_accepted() {
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

void enqueue_launches_what_the_index_lists() {
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
  CHECK(several.size.threads == 128 && several.size.shared_bytes == 70000);
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
  CHECK(recorder->copies[0].target == distinct.outputs[1] &&
        recorder->copies[0].source == distinct.inputs[3]);
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

void enqueue_refuses_wrong_calls_and_launches_nothing() {
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
  CHECK(recorder->launches.empty() && recorder->copies.empty());

  recorder->refuses = true;
  CHECK(enqueue(*plugin, call, Addresses(true)) != 0);
  CHECK(logger.took_error("the recorder refuses"));
}

void a_restored_plugin_is_the_one_that_was_serialised() {
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
      CHECK(again->fields[i].type == fields->fields[i].type &&
            again->fields[i].length == fields->fields[i].length);
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

void damaged_kernels_are_refused() {
  auto plugin = create();
  const auto* fields = plugin->getFieldsToSerialize();
  std::vector<nvinfer1::PluginField> damaged(fields->fields, fields->fields + fields->nbFields);
  nvinfer1::PluginField& kernels = damaged.back();
  const std::string image(static_cast<const char*>(kernels.data), static_cast<std::size_t>(kernels.length));
  Logger& logger = Logger::install();
  const auto refuse = [&](const std::string& bytes) {
    kernels.data = bytes.data();
    kernels.length = static_cast<std::int32_t>(bytes.size());
    CHECK(create(damaged, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(logger.took_error("createPlugin: layer 'layer'"));
  };
  for (std::size_t cut = 0; cut < image.size(); cut += 13) refuse(image.substr(0, cut));
  for (std::size_t place = 0; place < image.size(); place += 7) {
    std::string changed = image;
    changed[place] = static_cast<char>(changed[place] ^ 0x20);
    refuse(changed);
  }
  refuse(image + "x");
  // Damaged behind a hash that is right: sizes that lead out of the image.
  std::string content = image.substr(0, image.size() - 64);
  content[12] = '\xff';
  content[14] = '\xff';
  refuse(content + sha256_hex(content));
}

void damaged_directories_are_refused() {
  Logger& logger = Logger::install();
  const auto refused = [&](const char* message, const std::string& path) {
    CHECK(create(node_fields(path, kAttributes), TensorRTPhase::kBUILD) == nullptr);
    CHECK(logger.took_error(message));
  };
  refused("cannot read /nowhere/index.json", "/nowhere");
  KernelDirectory directory;
  directory.write("one.cubin", "other code");
  refused("is not the file the index was written for", directory.path());
  std::remove(directory.file("one.cubin").c_str());
  refused("one.cubin; compile the kernels again", directory.path());
  // Every cut and many changes of the index: an error or a plugin, never a crash.
  const std::string index = kIndex;
  for (std::size_t cut = 0; cut < index.size(); cut += 29) {
    const KernelDirectory broken(index.substr(0, cut));
    refused("layer 'layer'", broken.path());
  }
  for (const auto& [from, to] :
       std::vector<std::pair<std::string, std::string>>{{"chai-kernels/1", "chai-kernels/9"},
                                                        {"float16", "float8"},
                                                        {"\"threads\": 128", "\"threads\": -1"},
                                                        {"\"S 4 cdiv\"", "\"S 4\""},
                                                        {"several.cubin", "../x"},
                                                        {"\"tensor\": \"query\"", "\"tensor\": \"q\""},
                                                        {"\"launches\": [", "\"launch\": ["},
                                                        {"90", "\"90\""},
                                                        {"\"probe_tokens\": 5", "\"probe_tokens\": 6"}}) {
    std::string changed = index;
    changed.replace(changed.find(from), from.size(), to);
    const KernelDirectory broken(changed);
    refused("layer 'layer'", broken.path());
  }
}

void wrong_fields_are_refused() {
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

void a_plugin_without_gpu_says_so() {
  auto plugin = create();
  CHECK(plugin->attachToContext(nullptr) == nullptr);
  CHECK(Logger::install().took_error("attachToContext: no TensorRT library is loaded in this process"));
}

void a_thousand_plugins_leave_nothing_behind() {
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

int main() {
  using namespace chai::tensorrt::test;
  Logger::install();
  sha256_knows_its_test_vectors();
  formulas_evaluate_as_python_does();
  output_shapes_are_expressions_of_input_shapes();
  workspace_is_what_the_index_says();
  only_linear_tensors_of_the_compiled_types_are_accepted();
  enqueue_launches_what_the_index_lists();
  enqueue_refuses_wrong_calls_and_launches_nothing();
  a_restored_plugin_is_the_one_that_was_serialised();
  damaged_kernels_are_refused();
  damaged_directories_are_refused();
  wrong_fields_are_refused();
  a_plugin_without_gpu_says_so();
  a_thousand_plugins_leave_nothing_behind();
  return 0;
}
