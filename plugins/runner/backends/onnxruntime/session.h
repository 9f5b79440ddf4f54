// A bundle on ONNX Runtime's CPU provider: rows in pages of pools that are bound once.
// With the op library it appends in place: each pool is one buffer, bound as past and as present. Without it
// the function body writes whole pools anew, so there are two sets of buffers that swap roles; they hold the
// pages that were touched and grow by doubling. Head maps are kept here by row and travel with each call.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "runner/backends/onnxruntime/model.h"
#include "runner/caches.h"
#include "runner/manifest.h"
#include "runner/pages.h"
#include "runner/row_maps.h"
#include "runner/session.h"

namespace chai {

class OnnxRuntimeSession final : public Session {
 public:
  struct Settings {
    std::int64_t page_length = kPageLength;
    std::function<std::int64_t()> available_memory = chai::available_memory;
  };

  // Without an op_library the function body runs.
  OnnxRuntimeSession(Ort::Env& environment, const std::string& bundle, const Manifest& manifest,
                     const Options& options, const std::string& op_library, Settings settings);
  OnnxRuntimeSession(Ort::Env& environment, const std::string& bundle, const Manifest& manifest,
                     const Options& options, const std::string& op_library)
      : OnnxRuntimeSession(environment, bundle, manifest, options, op_library, Settings()) {}

  bool in_place() const override { return in_place_; }
  // The op library works in blocks; the function body makes whole score matrices.
  bool bounded_scratch() const override { return in_place_; }
  std::int64_t page_length() const override { return settings_.page_length; }
  std::int64_t capacity() const override { return longest_; }
  Room room() const override;
  void drop() override;
  void start(std::int64_t rows, std::int64_t pages) override;
  bool promise(std::int64_t row, std::int64_t tokens) override;
  void release(std::int64_t row) override { pool_.release(row); }
  const std::vector<float>& step(const Step& step, const std::vector<std::int64_t>& rows) override;

  const PagePool& pool() const { return pool_; }
  // Of a page, over all layers: codes and scales of keys and values.
  std::int64_t page_bytes() const { return bytes_per_token(tensors_) * settings_.page_length; }
  // [layers][rows][heads]: query head to representative, after the last step of each row.
  const std::vector<std::int32_t>& head_map() const { return maps_.all(); }
  // The buffers of the pools that hold the past of the next step, in the order of cache_tensors().
  const std::vector<ReservedMemory>& buffers() const { return caches_[turn_]; }

 private:
  using Caches = std::vector<ReservedMemory>;

  std::size_t sets() const { return in_place_ ? 1 : 2; }
  void allocate(std::int64_t pages);
  void grow(std::int64_t pages);
  void run(const Step& step, const std::vector<std::int64_t>& rows);

  Settings settings_;
  std::int64_t cache_memory_;
  Geometry geometry_;
  std::vector<CacheTensor> tensors_;
  bool in_place_;
  OnnxRuntimeModel model_;
  PagePool pool_;
  std::int64_t longest_ = 0;    // promise
  std::int64_t allocated_ = 0;  // pages
  RowMaps maps_;
  std::vector<Caches> caches_;            // one set, or two; caches_[turn_] holds the past of the next step
  std::vector<Ort::IoBinding> bindings_;  // one per turn
  std::size_t turn_ = 0;
  Logits logits_;
};

}  // namespace chai
