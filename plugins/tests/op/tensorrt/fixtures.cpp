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
          {"key_bits", &attributes.key_bits, PluginFieldType::kINT32, 1},
          {"value_bits", &attributes.value_bits, PluginFieldType::kINT32, 1},
          {"group", &attributes.group, PluginFieldType::kINT32, 1},
          {"window", &attributes.window, PluginFieldType::kINT32, 1},
          {"softcap", &attributes.softcap, PluginFieldType::kFLOAT32, 1},
          {"kernel_directory", directory.data(), PluginFieldType::kCHAR,
           static_cast<std::int32_t>(directory.size())}};
}

}  // namespace chai::tensorrt::test
