// Runs a bundle of chai_export in a C++ program: token ids in, token ids out.
//
//   chai::Runner runner = chai::Runner::open("bundle");
//   for (std::int64_t token : runner.generate({{17, 4, 256, 9}})[0].token_ids) …
//
// Every failure is a std::runtime_error whose message names the cause and what to do. A Runner is used by one
// thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#define CHAI_RUNTIME_API __attribute__((visibility("default")))

namespace chai {

enum class Backend { kOnnxRuntime, kTensorRt };

// kAll keeps every KV head in the K cache, which makes the same graph plain attention.
enum class Heads { kChai, kAll };

struct Options {
  Backend backend = Backend::kOnnxRuntime;
  Heads heads = Heads::kChai;
  // Within an operator; 0 lets the back end decide.
  int threads = 0;
  // Prompts computed at one time; more wait their turn. 0: what the engine was built for, else 8.
  std::int64_t max_batch = 0;
  // Bytes that KV caches may take; prompts that find no room wait. 0: what the engine was built for, else
  // most of the memory that is free.
  std::int64_t cache_memory = 0;
  // libonnxruntime.so. Empty: $CHAI_ONNXRUNTIME_LIBRARY, the one already loaded, the one named when this
  // library was built, or the loader's. A process has one; the first one loaded stays.
  std::string onnxruntime_library;
  // libchai_onnxruntime.so or libchai_tensorrt.so. Unset: looked for beside this library unless
  // $CHAI_EXPORT_NATIVE is 0. Empty, or not found: ONNX Runtime runs the op's function body, which is slower.
  std::optional<std::string> op_library;
};

struct GenerateOptions {
  std::int64_t max_new_tokens = 64;
  // Most tokens of prompt and text together; 0: what the model, the engine and memory allow.
  std::int64_t max_seq = 0;
  // Instead of the bundle's; an empty list means that no token ends a text.
  std::optional<std::vector<std::int64_t>> eos_token_ids;
  // 0 is greedy.
  double temperature = 0.0;
  // Unset: the bundle's default, else 50, 1 and 1. 0, 1 and 1 turn them off.
  std::optional<std::int64_t> top_k;
  std::optional<double> top_p;
  std::optional<double> repetition_penalty;
  // The same seed gives a prompt the same text, alone or in company. Unset: chance.
  std::optional<std::uint64_t> seed;
};

// An end-of-sequence token, max_new_tokens, or no position left.
enum class StopReason { kEos, kLength, kCapacity };

// "eos", "length" or "capacity".
CHAI_RUNTIME_API const char* name(StopReason reason);

struct Generation {
  std::vector<std::int64_t> token_ids;  // the new ones, an end-of-sequence token included
  std::int64_t prompt_tokens = 0;
  StopReason stop_reason = StopReason::kLength;
};

// Called with the index of the prompt and its next token, as soon as that is chosen.
using OnToken = std::function<void(std::size_t prompt, std::int64_t token)>;

class CHAI_RUNTIME_API Runner {
 public:
  // `bundle` is a directory written by `chai-export export` or `rewrite`.
  static Runner open(const std::string& bundle, const Options& options = {});

  Runner(Runner&& other) noexcept;
  Runner& operator=(Runner&& other) noexcept;
  ~Runner();

  // One text for each prompt, in their order.
  std::vector<Generation> generate(const std::vector<std::vector<std::int64_t>>& prompts,
                                   const GenerateOptions& options = {}, const OnToken& on_token = {});

  // Whether the op library appends to the caches in place; otherwise the function body runs.
  bool in_place() const;

 private:
  struct State;
  explicit Runner(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace chai
