// A bundle of version 1 of the op on ONNX Runtime's CPU provider. With the op library each cache is one
// buffer, bound as past and as present; without it the function body reads the whole past while it writes the
// whole present, so there are two sets of buffers that swap roles. The head map always has two.
#pragma once

#include <array>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "runner/backends/onnxruntime/model.h"
#include "runner/caches.h"
#include "runner/manifest.h"
#include "runner/session.h"

namespace chai {

class OnnxRuntimeSession final : public Session {
 public:
  // `op_library` is empty to run the function body. Throws std::runtime_error. The environment comes from
  // outside because no object of ONNX Runtime may exist, even an empty one, before its library is open.
  OnnxRuntimeSession(Ort::Env& environment, const std::string& bundle, const Manifest& manifest,
                     const Options& options, const std::string& op_library);

  bool in_place() const override { return in_place_; }
  // The op library works in blocks; the function body makes whole score matrices.
  bool bounded_scratch() const override { return in_place_; }
  bool can_grow() const override { return true; }
  std::int64_t max_tokens() const override { return kUnlimited; }
  std::int64_t capacity() const override { return capacity_; }
  void begin(std::int64_t batch, std::int64_t capacity) override;
  void grow(std::int64_t capacity) override;
  const std::vector<float>& step(const Step& step) override;

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  struct Cache {
    CacheTensor tensor;
    std::unique_ptr<char, Free> data;
  };
  using Caches = std::vector<Cache>;

  Cache allocate(const CacheTensor& tensor) const;
  Caches allocate_all() const;
  std::size_t bytes(const CacheTensor& tensor) const;
  Ort::Value value(const Cache& cache) const;
  void bind();
  void run(const Step& step);

  Geometry geometry_;
  std::vector<CacheTensor> tensors_;
  bool in_place_;
  OnnxRuntimeModel model_;
  std::int64_t batch_ = 0;
  std::int64_t capacity_ = 0;
  std::vector<Caches> caches_;  // one set, or two; caches_[turn % size] holds the past of the next step
  std::array<std::vector<std::int32_t>, 2> head_maps_;
  std::vector<Ort::IoBinding> bindings_;  // one per turn
  std::size_t turn_ = 0;
  Logits logits_;
};

}  // namespace chai
