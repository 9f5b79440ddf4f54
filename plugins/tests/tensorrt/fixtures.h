// Stand-ins for what TensorRT and a GPU bring: a logger, an expression builder, a launcher, kernels.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attributes.h"
#include "launcher.h"
#include "plugin.h"

namespace chai::tensorrt::test {

// Ends the test program, naming the place, when a condition does not hold.
void check(bool condition, const char* text, const char* file, int line);
#define CHECK(condition) chai::tensorrt::test::check((condition), #condition, __FILE__, __LINE__)

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

// Remembers what it is asked for.
class RecordingLauncher final : public Launcher {
 public:
  struct Launch {
    std::size_t kernel;
    LaunchSize size;
    std::vector<std::uint64_t> arguments;  // the 8 bytes at each argument's place
  };
  struct Copy {
    void* target;
    const void* source;
    std::size_t bytes;
  };

  // Kernels with this many arguments; the index says so, a launch does not.
  explicit RecordingLauncher(std::vector<std::size_t> argument_counts)
      : argument_counts_(std::move(argument_counts)) {}
  void launch(std::size_t kernel, const LaunchSize& size, void** arguments, cudaStream_t stream) override;
  void copy(void* target, const void* source, std::size_t bytes, cudaStream_t stream) override;

  std::vector<Launch> launches;
  std::vector<Copy> copies;
  bool refuses = false;

 private:
  std::vector<std::size_t> argument_counts_;
};

// Two kernels for H=4, G=2, D=16, Dv=8, P=5, float16: one for S > 1, one for S = 1.
extern const char* const kIndex;
inline const std::vector<std::size_t> kArgumentCounts = {6, 4};

// A directory of kernels, removed with the object.
class KernelDirectory {
 public:
  explicit KernelDirectory(const std::string& index = kIndex);
  ~KernelDirectory();
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }
  void write(const std::string& name, const std::string& content) const;

 private:
  std::string path_;
};

// The fields of a node whose kernels lie in a directory.
std::vector<nvinfer1::PluginField> node_fields(const std::string& directory, const Attributes& attributes);

// Shapes of the eight inputs, and tensors at made-up addresses.
struct Call {
  std::int64_t batch = 2;
  std::int64_t tokens = 7;
  std::int64_t kept = 1;
  std::int64_t capacity = 64;
  bool in_place = true;

  std::vector<nvinfer1::PluginTensorDesc> inputs() const;
  std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic() const;
};

}  // namespace chai::tensorrt::test
