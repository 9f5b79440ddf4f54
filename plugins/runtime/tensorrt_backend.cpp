// The TensorRT session behind the runner's interface.
#include "../tensorrt_runtime/session.h"
#include "backends.h"
#include "error.h"

namespace chai {
namespace {

constexpr const char* kPlan = "/engines/tensorrt/engine.plan";

class TensorRtBackend final : public Session {
 public:
  TensorRtBackend(const std::string& plan, const std::string& plugin, bool all_heads)
      : session_(plan, plugin, all_heads) {}

  const TensorRtSession::Geometry& geometry() const { return session_.geometry(); }
  bool in_place() const override { return true; }
  bool can_grow() const override { return false; }
  std::int64_t max_tokens() const override { return geometry().max_tokens; }
  std::int64_t capacity() const override { return capacity_; }

  void begin(std::int64_t batch, std::int64_t capacity) override {
    session_.begin(batch, capacity);
    capacity_ = capacity;
  }

  void grow(std::int64_t capacity) override {
    throw std::logic_error("a TensorRT session cannot grow to " + std::to_string(capacity));
  }

  const std::vector<float>& step(const Step& step) override {
    logits_ = session_.step(step.input_ids, step.lengths, step.past_lengths, step.output_positions);
    return logits_;
  }

 private:
  TensorRtSession session_;
  std::int64_t capacity_ = 0;
  std::vector<float> logits_;
};

}  // namespace

std::unique_ptr<Session> open_tensorrt_session(const std::string& bundle, const Manifest& manifest,
                                               const Options& options, const std::string& plugin) {
  require(manifest.num_caches() == manifest.kept_heads.size(),
          bundle + " has layers that read another layer's KV cache, which TensorRT engines do not have; use "
                   "ONNX Runtime");
  const std::string again = "; run `chai-export build " + bundle + " --backend tensorrt`";
  const auto record = manifest.engines.find("tensorrt");
  require(record != manifest.engines.end(), bundle + " has no tensorrt engine" + again + " first");
  require(record->second.is_of_this_model,
          "the tensorrt engine was built from another model.onnx" + again + " again");
  require(record->second.has_plugin,
          "the tensorrt engine is one of the function body, which this library does not run" + again);
  auto session = std::make_unique<TensorRtBackend>(bundle + kPlan, plugin, options.heads == Heads::kAll);
  const TensorRtSession::Geometry& geometry = session->geometry();
  require(geometry.layers == manifest.num_layers && geometry.query_heads == manifest.num_query_heads &&
              geometry.kv_heads == manifest.num_kv_heads && geometry.vocab_size == manifest.vocab_size &&
              geometry.kept_heads == manifest.kept_heads,
          "the tensorrt engine does not fit the bundle's manifest" + again + " again");
  return session;
}

}  // namespace chai
