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
#include <vector>

namespace chai {

class TensorRtSession {
 public:
  // Sizes that the engine tells about itself.
  struct Geometry {
    std::int64_t layers = 0;
    std::int64_t query_heads = 0;
    std::int64_t kv_heads = 0;
    std::int64_t vocab_size = 0;
    std::int64_t max_batch = 0;
    std::int64_t max_tokens = 0;  // new tokens of a row in one step
    std::int64_t max_capacity = 0;
    std::vector<std::int64_t> kept_heads;  // per layer
  };

  // `plugin` is the path of libchai_tensorrt.so. With `all_heads` every KV head is kept, which makes the
  // engine plain attention. Throws std::runtime_error with the reason.
  TensorRtSession(const std::string& plan, const std::string& plugin, bool all_heads = false);
  ~TensorRtSession();
  TensorRtSession(const TensorRtSession&) = delete;
  TensorRtSession& operator=(const TensorRtSession&) = delete;

  const Geometry& geometry() const { return geometry_; }

  // Starts `batch` empty rows with room for `capacity` tokens each. What was there before is gone.
  void begin(std::int64_t batch, std::int64_t capacity);

  // Feeds new tokens to every row and returns the logits, [B][N][vocab_size].
  //   input_ids         [B][S], padded on the right
  //   lengths           [B], valid tokens of each row; 0 leaves a row alone
  //   past_lengths      [B], tokens of the row that are in the cache; 0 starts the row afresh
  //   output_positions  [B][N], which of the S tokens want logits
  // A row's first call must bring all of its first 5 tokens (the bundle's probe_tokens), or as many as it
  // has.
  std::vector<float> step(const std::vector<std::int64_t>& input_ids,
                          const std::vector<std::int32_t>& lengths,
                          const std::vector<std::int32_t>& past_lengths,
                          const std::vector<std::int64_t>& output_positions);

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

  void read_geometry(bool all_heads);
  void make_context(Profile profile);
  void allocate_caches();
  Feeds make_feeds(std::int64_t tokens, std::int64_t outputs) const;
  void fill(const Feeds& feeds, const std::vector<std::int64_t>& input_ids,
            const std::vector<std::int32_t>& lengths, const std::vector<std::int32_t>& past_lengths,
            const std::vector<std::int64_t>& output_positions);
  void bind(Profile profile, const Feeds& feeds);
  void execute(Profile profile);
  void capture_decode();
  void drop_decode();
  std::vector<float> read_logits(const Feeds& feeds) const;

  cudaStream_t stream_ = nullptr;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> contexts_[2];
  Geometry geometry_;
  std::vector<std::int64_t> cached_heads_;  // per layer: kept heads, or all

  std::int64_t batch_ = 0;
  std::int64_t capacity_ = 0;
  std::map<std::string, Buffer> caches_;  // by name without "past_" and "present_"
  Buffer head_map_;
  Buffer present_head_map_;

  std::unique_ptr<Feeds> decode_;
  cudaGraphExec_t decode_graph_ = nullptr;
};

}  // namespace chai
