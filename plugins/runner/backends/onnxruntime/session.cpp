#include "runner/backends/onnxruntime/session.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "support/error.h"

namespace chai {
namespace {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector register

}  // namespace

OnnxRuntimeSession::OnnxRuntimeSession(Ort::Env& environment, const std::string& bundle,
                                       const Manifest& manifest, const Options& options,
                                       const std::string& op_library)
    : geometry_(manifest.geometry),
      tensors_(cache_tensors(manifest, options.heads)),
      in_place_(!op_library.empty()),
      model_(environment, bundle, manifest, options, op_library) {}

std::size_t OnnxRuntimeSession::bytes(const CacheTensor& tensor) const {
  return static_cast<std::size_t>(batch_ * capacity_ * tensor.bytes_per_token());
}

OnnxRuntimeSession::Cache OnnxRuntimeSession::allocate(const CacheTensor& tensor) const {
  Cache cache{tensor, nullptr};
  const std::size_t size = (bytes(tensor) + kAlignment - 1) / kAlignment * kAlignment;
  // What has not been written stays undefined: the op never reads it.
  cache.data.reset(static_cast<char*>(std::aligned_alloc(kAlignment, size)));
  require(cache.data != nullptr, "there is no memory for a KV cache of " + std::to_string(batch_) +
                                     " rows of " + std::to_string(capacity_) +
                                     " tokens; lower max_seq, or give shorter or fewer prompts");
  return cache;
}

OnnxRuntimeSession::Caches OnnxRuntimeSession::allocate_all() const {
  Caches caches;
  for (const CacheTensor& tensor : tensors_) caches.push_back(allocate(tensor));
  return caches;
}

void OnnxRuntimeSession::begin(std::int64_t batch, std::int64_t capacity) {
  bindings_.clear();
  caches_.clear();
  batch_ = batch;
  capacity_ = capacity;
  turn_ = 0;
  for (std::size_t i = 0; i < (in_place_ ? 1 : 2); ++i) caches_.push_back(allocate_all());
  for (auto& map : head_maps_)
    map.assign(static_cast<std::size_t>(geometry_.num_layers * batch * geometry_.num_query_heads), 0);
  bind();
}

void OnnxRuntimeSession::grow(std::int64_t capacity) {
  bindings_.clear();
  Caches old = std::move(caches_[turn_ % caches_.size()]);
  caches_.clear();  // the other set holds nothing yet: its memory is given back before more is asked for
  const std::int64_t used = capacity_;
  Caches larger;
  for (Cache& cache : old) {
    const auto rows = static_cast<std::size_t>(batch_ * cache.tensor.heads);
    capacity_ = used;
    const std::size_t from = bytes(cache.tensor) / rows;
    capacity_ = capacity;
    larger.push_back(allocate(cache.tensor));
    const std::size_t to = bytes(cache.tensor) / rows;
    for (std::size_t row = 0; row < rows; ++row)
      std::memcpy(larger.back().data.get() + row * to, cache.data.get() + row * from, from);
    cache.data.reset();
  }
  caches_.push_back(std::move(larger));
  if (!in_place_) caches_.push_back(allocate_all());
  if (turn_ == 1) std::swap(head_maps_[0], head_maps_[1]);
  turn_ = 0;
  bind();
}

Ort::Value OnnxRuntimeSession::value(const Cache& cache) const {
  return model_.value(cache.tensor.type, cache.data.get(), bytes(cache.tensor),
                      {batch_, cache.tensor.heads, capacity_, cache.tensor.columns});
}

void OnnxRuntimeSession::bind() {
  const std::vector<std::int64_t> map_shape{geometry_.num_layers, batch_, geometry_.num_query_heads};
  for (std::size_t turn = 0; turn < 2; ++turn) {
    Ort::IoBinding binding(model_.session());
    const Caches& past = caches_[turn % caches_.size()];
    const Caches& present = caches_[(turn + 1) % caches_.size()];
    for (std::size_t i = 0; i < past.size(); ++i) {
      binding.BindInput(("past_" + past[i].tensor.name).c_str(), value(past[i]));
      binding.BindOutput(("present_" + present[i].tensor.name).c_str(), value(present[i]));
    }
    binding.BindInput("head_map", model_.value(head_maps_[turn], map_shape));
    binding.BindOutput("present_head_map", model_.value(head_maps_[1 - turn], map_shape));
    logits_.bind(binding, model_, batch_, geometry_.vocab_size);
    bindings_.push_back(std::move(binding));
  }
}

const std::vector<float>& OnnxRuntimeSession::step(const Step& step) {
  for (std::size_t row = 0; row < step.lengths.size(); ++row)
    require(step.lengths[row] == 0 || step.past_lengths[row] + step.lengths[row] <= capacity_,
            "a row does not fit its cache");
  try {
    run(step);
  } catch (const Ort::Exception& error) {
    throw std::runtime_error(std::string("ONNX Runtime could not run a step: ") + error.what());
  }
  turn_ = 1 - turn_;
  return logits_.read();
}

void OnnxRuntimeSession::run(const Step& step) {
  Ort::IoBinding& binding = bindings_[turn_];
  const std::int64_t tokens = static_cast<std::int64_t>(step.input_ids.size()) / batch_;
  binding.BindInput("input_ids", model_.value(step.input_ids, {batch_, tokens}));
  binding.BindInput("lengths", model_.value(step.lengths, {batch_}));
  binding.BindInput("past_lengths", model_.value(step.past_lengths, {batch_}));
  binding.BindInput("output_positions", model_.value(step.output_positions, {batch_, 1}));
  model_.session().Run(Ort::RunOptions(), binding);
}

}  // namespace chai
