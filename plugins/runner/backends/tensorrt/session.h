// A bundle's TensorRT engine in a C++ program: prefill and decode with caches that stay on the GPU.
//
// The same order of things as chai_export/runtime/tensorrt_session.py: two profiles of one engine, each cache
// one buffer bound as past and as present, decode steps replayed as a CUDA graph. Token ids in, logits out;
// choosing the next token and turning ids into text is the caller's business.
//
// No GPU has run this code yet: it is compiled against TensorRT's headers, and linked.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "runner/geometry.h"
#include "runner/session.h"

namespace chai {

class TensorRtSession final : public Session {
 public:
  // `plugin` is the path of libchai_tensorrt.so. Throws std::runtime_error with the reason.
  TensorRtSession(const std::string& plan, const std::string& plugin, Heads heads = Heads::kChai);
  ~TensorRtSession() override;
  TensorRtSession(const TensorRtSession&) = delete;
  TensorRtSession& operator=(const TensorRtSession&) = delete;

  // What the engine tells about itself: all but probe_tokens.
  const Geometry& geometry() const { return geometry_; }

  bool in_place() const override { return true; }
  bool bounded_scratch() const override { return true; }
  bool can_grow() const override { return false; }
  std::int64_t max_tokens() const override { return max_tokens_; }
  std::int64_t capacity() const override { return capacity_; }
  // Most tokens of a row, and most rows.
  std::int64_t max_capacity() const { return max_capacity_; }
  std::int64_t max_batch() const { return max_batch_; }

  // What was there before is gone.
  void begin(std::int64_t batch, std::int64_t capacity) override;
  // Throws: all that may be needed is allocated by begin().
  void grow(std::int64_t capacity) override;

  // A row's first step must bring all of its first probe_tokens tokens (manifest.json has the number), or as
  // many as it has.
  const std::vector<float>& step(const Step& step) override;

  // [L][B][H]: query head to representative, after the last step.
  std::vector<std::int32_t> head_map() const;

 private:
  // Memory on the GPU.
  class Buffer {
   public:
    Buffer() = default;
    explicit Buffer(std::size_t bytes);
    ~Buffer();
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&& other) noexcept;
    void* get() const { return data_; }
    std::size_t bytes() const { return bytes_; }

   private:
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
  };

  // The tensors of one step that are not caches, for one number of tokens and positions.
  struct Feeds {
    std::int64_t tokens = 0;
    std::int64_t outputs = 0;
    std::map<std::string, Buffer> inputs;
    Buffer logits;
  };

  enum Profile : std::int32_t { kPrefill = 0, kDecode = 1 };

  void load_plugin(const std::string& library);
  void read_geometry(Heads heads);
  void make_contexts();
  void allocate_caches();
  Feeds make_feeds(std::int64_t tokens, std::int64_t outputs) const;
  void fill(const Feeds& feeds, const Step& step);
  void bind(Profile profile, const Feeds& feeds);
  void execute(Profile profile);
  void capture_decode();
  void drop_decode();
  const std::vector<float>& read_logits(const Feeds& feeds);

  struct Destroy {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
    void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  template <typename Handle>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

  // In the order in which they are made; they go in the reverse order, from a constructor that throws too.
  Owned<cudaStream_t> stream_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  Buffer scratch_;  // of both contexts, which never run at one time
  std::unique_ptr<nvinfer1::IExecutionContext> contexts_[2];
  Geometry geometry_;
  std::vector<std::int64_t> cached_heads_;  // per layer: kept heads, or all
  std::int64_t max_batch_ = 0;
  std::int64_t max_tokens_ = 0;  // new tokens of a row in one step
  std::int64_t max_capacity_ = 0;

  std::int64_t batch_ = 0;
  std::int64_t capacity_ = 0;
  std::map<std::string, Buffer> caches_;  // by name without "past_" and "present_"
  Buffer head_map_;
  Buffer present_head_map_;

  std::unique_ptr<Feeds> decode_;
  Owned<cudaGraphExec_t> decode_graph_;
  std::vector<float> logits_;
};

}  // namespace chai
