#include "tests/op/tensorrt/fixtures.h"

#include <cstdio>

#include "op/tensorrt/log.h"

namespace chai::tensorrt::test {

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
