// Stand-ins for what TensorRT brings: a logger, an expression builder, the fields of a node.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "op/tensorrt/attributes.h"

namespace chai::tensorrt::test {

// Collects messages; install() makes it the library's logger.
class Logger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
 public:
  static Logger& install();
  void log(Severity severity, const char* message) noexcept override;
  nvinfer1::ILogger* findLogger() override { return this; }
  ~Logger() override = default;

  // Whether an error with this text was logged since the last call.
  bool took_error(const std::string& text);
  bool took_none();

 private:
  std::vector<std::string> errors_;
};

// Expressions as text: "B", "4", "(4*16)". TensorRT's classes forward to an implementation: here, themselves.
class Expression final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Expression(std::string text) : text_(std::move(text)) { mImpl = this; }
  const std::string& text() const { return text_; }
  bool isConstant() const override { return false; }
  std::int64_t getConstantValue() const override { return 0; }
  bool isSizeTensor() const override { return false; }

 private:
  std::string text_;
};

class ExpressionBuilder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
 public:
  ExpressionBuilder() { mImpl = this; }
  const nvinfer1::IDimensionExpr* symbol(const std::string& text);
  const nvinfer1::IDimensionExpr* constant(std::int64_t value) override {
    return symbol(std::to_string(value));
  }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation op,
                                            const nvinfer1::IDimensionExpr& first,
                                            const nvinfer1::IDimensionExpr& second) override;
  const nvinfer1::IDimensionExpr* declareSizeTensor(std::int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Expression>> expressions_;
};

// The fields of a node whose kernels lie in a directory.
std::vector<nvinfer1::PluginField> node_fields(const std::string& directory, const Attributes& attributes);

}  // namespace chai::tensorrt::test
