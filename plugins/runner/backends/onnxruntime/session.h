// A bundle on ONNX Runtime's CPU provider. With the op library each cache is one buffer, bound as past and as
// present; without it the function body reads the whole past while it writes the whole present, so there are
// two sets of buffers that swap roles. The head map always has two.
#pragma once

#include <array>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "runner/backends/onnxruntime/library.h"
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
  // One K or V cache, [batch][heads][capacity][dim].
  struct Cache {
    std::string name;  // without "past_" and "present_"
    std::int64_t heads = 0;
    std::int64_t dim = 0;
    std::unique_ptr<char, Free> data;
  };
  using Caches = std::vector<Cache>;

  Cache allocate(const std::string& name, std::int64_t heads, std::int64_t dim) const;
  Caches allocate_all() const;
  std::size_t bytes(const Cache& cache) const;
  Ort::Value value(const Cache& cache) const;
  template <typename T>
  Ort::Value value(const std::vector<T>& data, const std::vector<std::int64_t>& shape) const;
  void bind();
  void run(const Step& step);

  ItemType item_type_;
  Geometry geometry_;
  Heads heads_;
  bool in_place_;
  Ort::MemoryInfo memory_{nullptr};
  Ort::Session session_{nullptr};
  bool half_logits_ = false;
  std::int64_t batch_ = 0;
  std::int64_t capacity_ = 0;
  std::vector<Caches> caches_;  // one set, or two; caches_[turn % size] holds the past of the next step
  std::array<std::vector<std::int32_t>, 2> head_maps_;
  std::vector<Ort::IoBinding> bindings_;  // one per turn
  std::size_t turn_ = 0;
  std::vector<float> logits_;
  std::vector<Ort::Float16_t> raw_logits_;
};

}  // namespace chai
