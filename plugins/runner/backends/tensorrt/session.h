// A bundle's TensorRT engine in a C++ program: rows in pages of pools that stay on the GPU.
//
// The same order of things as chai_export/runtime/tensorrt_session.py: two profiles of one engine, each pool
// one buffer bound as past and as present, decode steps replayed as CUDA graphs, one for each shape. Token
// ids in, logits out; choosing the next token and turning ids into text is the caller's business.
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
#include <utility>
#include <vector>

#include "runner/backends/tensorrt/device_memory.h"
#include "runner/geometry.h"
#include "runner/pages.h"
#include "runner/row_maps.h"
#include "runner/session.h"

namespace chai {

class TensorRtSession final : public Session {
 public:
  // Shapes of decode steps that have a graph at one time.
  static constexpr std::size_t kMostGraphs = 16;

  // `plugin` is the path of libchai_tensorrt.so, `cache_memory` the bytes that pools may take, 0 for what is
  // free. Throws std::runtime_error with the reason.
  TensorRtSession(const std::string& plan, const std::string& plugin, Heads heads = Heads::kChai,
                  std::int64_t cache_memory = 0);
  ~TensorRtSession() override;
  TensorRtSession(const TensorRtSession&) = delete;
  TensorRtSession& operator=(const TensorRtSession&) = delete;

  // What the engine tells about itself: all but probe_tokens.
  const Geometry& geometry() const { return geometry_; }

  bool in_place() const override { return true; }
  bool bounded_scratch() const override { return true; }
  std::int64_t page_length() const override { return page_length_; }
  std::int64_t capacity() const override { return longest_; }
  // Most new tokens of a row in one step, most tokens of a row, and most rows.
  std::int64_t max_tokens() const { return max_tokens_; }
  std::int64_t max_capacity() const { return max_row_pages_ * page_length_; }
  std::int64_t max_batch() const { return max_batch_; }

  Room room() const override;
  void drop() override;
  // Allocates the pools: TensorRT has no tensor that grows.
  void start(std::int64_t rows, std::int64_t pages) override;
  bool promise(std::int64_t row, std::int64_t tokens) override;
  void release(std::int64_t row) override { pool_.release(row); }
  // A row's first step must bring all of its first probe_tokens tokens (manifest.json has the number), or as
  // many as it has.
  const std::vector<float>& step(const Step& step, const std::vector<std::int64_t>& rows) override;

  const PagePool& pool() const { return pool_; }
  // Of a page, over all layers: codes and scales of keys and values.
  std::int64_t page_bytes() const;
  // [layers][rows][heads]: query head to representative, after the last step of each row.
  const std::vector<std::int32_t>& head_map() const { return maps_.all(); }

 private:
  // A pool of pages: [pages][heads][page_length][columns].
  struct Pool {
    std::string name;  // of the engine's input and output, without graph::kPast and graph::kPresent
    std::int64_t heads = 0;
    std::int64_t columns = 0;
    std::int64_t item_bytes = 0;
    DeviceMemory memory;
  };

  // A tensor within a buffer.
  struct Part {
    const char* name = nullptr;
    nvinfer1::Dims shape{};
    std::size_t offset = 0;
    std::size_t bytes = 0;
  };

  // The tensors of steps of one shape that are not caches: inputs in one buffer, which one copy fills, and
  // logits and head maps in another.
  struct Feeds {
    std::vector<Part> inputs;
    DeviceMemory fed;
    Part logits;
    Part head_map;
    DeviceMemory made;
  };

  struct Sizes {
    std::int64_t rows = 0;
    std::int64_t tokens = 0;
    std::int64_t outputs = 0;
    std::int64_t row_pages = 0;
  };

  enum Profile : std::int32_t { kPrefill = 0, kDecode = 1 };

  struct Destroy {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
    void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  template <typename Handle>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;
  using Context = std::unique_ptr<nvinfer1::IExecutionContext>;

  // Decode steps of one shape, rows and pages of a row. The graph is good as long as its context stays as it
  // was, so each has its own.
  struct Decode {
    Context context;
    Feeds feeds;
    Owned<cudaGraphExec_t> graph;
    std::int64_t used = 0;  // when, counted in decode steps
  };

  void load_plugin(const std::string& library);
  void read_geometry(Heads heads);
  void read_pools();
  Context make_context(Profile profile) const;
  void check(const Step& step, const std::vector<std::int64_t>& rows) const;
  Sizes sizes_of(const Step& step, const std::vector<std::int64_t>& rows) const;
  Feeds make_feeds(const Sizes& sizes) const;
  void fill(const Feeds& feeds, const Step& step, const std::vector<std::int64_t>& rows);
  void bind(nvinfer1::IExecutionContext& context, const Feeds& feeds) const;
  void execute(nvinfer1::IExecutionContext& context) const;
  const Feeds& decode(const Sizes& sizes, const Step& step, const std::vector<std::int64_t>& rows);
  Context decode_context();
  void capture(Decode& decode) const;
  const std::vector<float>& read(const Feeds& feeds, const Step& step, const std::vector<std::int64_t>& rows);

  // In the order in which they are made; they go in the reverse order, from a constructor that throws too.
  Owned<cudaStream_t> stream_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  DeviceMemory scratch_;  // of all contexts, which never run at one time
  Context prefill_;
  std::vector<Context> spare_;  // for decode steps, which no graph uses
  Geometry geometry_;
  std::vector<std::int64_t> cached_heads_;  // per layer: kept heads, or all
  std::int64_t cache_memory_ = 0;
  std::int64_t max_batch_ = 0;
  std::int64_t max_tokens_ = 0;  // new tokens of a row in one step
  std::int64_t max_row_pages_ = 0;
  std::int64_t page_length_ = 0;

  std::vector<std::string> page_tables_;  // the engine's inputs: one for each window that layers have
  std::vector<Pool> pools_;
  PagePool pool_;
  RowMaps maps_;
  std::int64_t rows_ = 0;
  std::int64_t longest_ = 0;  // promise
  std::map<std::pair<std::int64_t, std::int64_t>, Decode> decodes_;
  std::int64_t decode_steps_ = 0;
  PinnedMemory staged_;  // inputs
  PinnedMemory fetched_;
  std::vector<float> logits_;
};

}  // namespace chai
