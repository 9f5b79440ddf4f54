#include "fixtures.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "log.h"
#include "sha256.h"

namespace chai::tensorrt::test {

void check(bool condition, const char* text, const char* file, int line) {
  if (condition) return;
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
  std::exit(1);
}

Logger& Logger::install() {
  static Logger logger;
  set_logger_finder(&logger);
  return logger;
}

void Logger::log(Severity severity, const char* message) noexcept {
  if (severity <= Severity::kERROR) errors_.emplace_back(message);
}

bool Logger::took_error(const std::string& text) {
  bool found = false;
  for (const std::string& error : errors_) found = found || error.find(text) != std::string::npos;
  if (!found) {
    for (const std::string& error : errors_) std::fprintf(stderr, "logged instead: %s\n", error.c_str());
  }
  errors_.clear();
  return found;
}

bool Logger::took_none() {
  const bool none = errors_.empty();
  for (const std::string& error : errors_) std::fprintf(stderr, "logged: %s\n", error.c_str());
  errors_.clear();
  return none;
}

const nvinfer1::IDimensionExpr* ExpressionBuilder::symbol(const std::string& text) {
  return expressions_.emplace_back(std::make_unique<Expression>(text)).get();
}

const nvinfer1::IDimensionExpr* ExpressionBuilder::operation(nvinfer1::DimensionOperation op,
                                                             const nvinfer1::IDimensionExpr& first,
                                                             const nvinfer1::IDimensionExpr& second) {
  if (op != nvinfer1::DimensionOperation::kPROD) return nullptr;
  const auto text = [](const nvinfer1::IDimensionExpr& e) {
    return static_cast<const Expression&>(e).text();
  };
  return symbol("(" + text(first) + "*" + text(second) + ")");
}

void RecordingLauncher::launch(std::size_t kernel, const LaunchSize& size, void** arguments, cudaStream_t) {
  if (refuses) throw std::runtime_error("the recorder refuses");
  Launch& launch = launches.emplace_back(Launch{kernel, size, {}});
  for (std::size_t i = 0; i < argument_counts_.at(kernel); ++i) {
    std::uint64_t value = 0;
    std::memcpy(&value, arguments[i], sizeof(value));
    launch.arguments.push_back(value);
  }
}

void RecordingLauncher::copy(void* target, const void* source, std::size_t bytes, cudaStream_t) {
  copies.push_back({target, source, bytes});
}

const char* const kIndex = R"({
  "format": "chai-kernels/1", "architecture": 90, "triton": "3.9.0",
  "spec": {"dtype": "float16", "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 16, "value_head_dim": 8,
           "probe_tokens": 5},
  "pointer_alignment": 16, "workspace_alignment": 256,
  "workspace": [{"name": "plan", "type": "int32", "count": "B G *"},
                {"name": "weights", "type": "float16", "count": "B C *"}],
  "launches": [
    {"kernel": "several", "file": "several.cubin", "sha256": "SHA_SEVERAL", "when": "1 S <",
     "grid": ["S 4 cdiv", "H", "B"], "threads": 128, "shared_bytes": 70000,
     "arguments": [{"type": "pointer", "tensor": "query"}, {"type": "pointer", "tensor": "weights"},
                   {"type": "int32", "value": "C"}, {"type": "float32", "attribute": "scale"},
                   {"type": "pointer", "tensor": "present_key"}, {"type": "pointer", "hidden": "global_scratch"}]},
    {"kernel": "one", "file": "one.cubin", "sha256": "SHA_ONE", "when": "S 1 ==",
     "grid": ["16 B R * cdiv", "R", "B"], "threads": 64, "shared_bytes": 0,
     "arguments": [{"type": "pointer", "tensor": "plan"}, {"type": "int32", "value": "online R G < *"},
                   {"type": "pointer", "tensor": "present_head_map"}, {"type": "pointer", "tensor": "output"}]}
  ]
})";

KernelDirectory::KernelDirectory(const std::string& index) {
  char name[] = "/tmp/chai-kernels-XXXXXX";
  CHECK(mkdtemp(name) != nullptr);
  path_ = name;
  write("several.cubin", "code of several");
  write("one.cubin", "code of one");
  std::string text = index;
  for (const auto& [placeholder, content] :
       {std::pair{"SHA_SEVERAL", "code of several"}, {"SHA_ONE", "code of one"}}) {
    const std::size_t place = text.find(placeholder);
    if (place != std::string::npos) text.replace(place, std::strlen(placeholder), sha256_hex(content));
  }
  write("index.json", text);
}

KernelDirectory::~KernelDirectory() {
  for (const char* name : {"several.cubin", "one.cubin", "index.json"}) std::remove(file(name).c_str());
  std::remove(path_.c_str());
}

void KernelDirectory::write(const std::string& name, const std::string& content) const {
  std::ofstream(file(name), std::ios::binary) << content;
}

std::vector<nvinfer1::PluginField> node_fields(const std::string& directory, const Attributes& attributes) {
  using nvinfer1::PluginFieldType;
  return {{"scale", &attributes.scale, PluginFieldType::kFLOAT32, 1},
          {"probe_tokens", &attributes.probe_tokens, PluginFieldType::kINT32, 1},
          {"online", &attributes.online, PluginFieldType::kINT32, 1},
          {"kernel_directory", directory.data(), PluginFieldType::kCHAR,
           static_cast<std::int32_t>(directory.size())}};
}

std::vector<nvinfer1::PluginTensorDesc> Call::inputs() const {
  using nvinfer1::DataType;
  const auto make = [](DataType type, std::initializer_list<std::int64_t> sizes) {
    nvinfer1::PluginTensorDesc desc{};
    desc.type = type;
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    for (const std::int64_t size : sizes) desc.dims.d[desc.dims.nbDims++] = size;
    return desc;
  };
  const DataType t = DataType::kHALF;
  return {make(t, {batch, 4, tokens, 16}),  make(t, {batch, 2, tokens, 16}),
          make(t, {batch, 2, tokens, 8}),   make(t, {batch, kept, capacity, 16}),
          make(t, {batch, 2, capacity, 8}), make(DataType::kINT32, {batch, 4}),
          make(DataType::kINT32, {batch}),  make(DataType::kINT32, {batch})};
}

std::vector<nvinfer1::DynamicPluginTensorDesc> Call::dynamic() const {
  std::vector<nvinfer1::DynamicPluginTensorDesc> all(kNumInputs + kNumOutputs);
  const auto fixed = inputs();
  for (std::size_t i = 0; i < fixed.size(); ++i) {
    all[i].desc = fixed[i];
    all[i].min = all[i].opt = all[i].max = fixed[i].dims;
  }
  // Types and formats of the outputs, as TensorRT sets them when it asks about a combination.
  for (std::size_t i = 0; i < kNumOutputs; ++i) {
    all[kNumInputs + i].desc.format = nvinfer1::TensorFormat::kLINEAR;
    all[kNumInputs + i].desc.type = i < 3 ? nvinfer1::DataType::kHALF : nvinfer1::DataType::kINT32;
  }
  return all;
}

}  // namespace chai::tensorrt::test
