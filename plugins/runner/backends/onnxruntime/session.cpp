#include "runner/backends/onnxruntime/session.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "runner/backends/onnxruntime/graph_check.h"
#include "support/error.h"
#include "support/half.h"

namespace chai {
namespace {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector register

std::string layer_name(const char* kind, std::int64_t layer) {
  return std::string(kind) + "." + std::to_string(layer);
}

Ort::Session open_session(const Ort::Env& environment, const std::string& model, const Options& options,
                          const std::string& op_library) {
  Ort::SessionOptions session_options;
  session_options.SetIntraOpNumThreads(options.threads);
  if (!op_library.empty()) {
    try {
      session_options.RegisterCustomOpsLibrary(op_library.c_str());
    } catch (const Ort::Exception& error) {
      throw std::runtime_error(op_library + " does not load in ONNX Runtime (" + error.what() +
                               "); build it again, or run without it");
    }
  }
  try {
    return Ort::Session(environment, model.c_str(), session_options);
  } catch (const Ort::Exception& error) {
    throw std::runtime_error("ONNX Runtime cannot load " + model + " (" + error.what() + "); export again");
  }
}

}  // namespace

OnnxRuntimeSession::OnnxRuntimeSession(Ort::Env& environment, const std::string& bundle,
                                       const Manifest& manifest, const Options& options,
                                       const std::string& op_library)
    : item_type_(manifest.item_type),
      geometry_(manifest.geometry),
      heads_(options.heads),
      in_place_(!op_library.empty()) {
  require(manifest.item_type != ItemType::kBfloat16,
          bundle +
              " is bfloat16, which ONNX Runtime does not compute on a CPU; export with --dtype float32 or "
              "float16");
  const std::string model = bundle + "/model.onnx";
  session_ = open_session(environment, model, options, op_library);
  memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  try {
    check_graph(session_, manifest);
  } catch (const std::exception& error) {
    throw std::runtime_error(model + " does not fit its manifest: " + error.what() +
                             "; export or rewrite again");
  }
  const Ort::AllocatorWithDefaultOptions allocator;
  for (std::size_t i = 0; i < session_.GetOutputCount(); ++i) {
    if (std::strcmp(session_.GetOutputNameAllocated(i, allocator).get(), "logits") != 0) continue;
    const Ort::TypeInfo info = session_.GetOutputTypeInfo(i);
    half_logits_ = info.GetTensorTypeAndShapeInfo().GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  }
}

std::size_t OnnxRuntimeSession::bytes(const Cache& cache) const {
  const std::int64_t elements = batch_ * cache.heads * capacity_ * cache.dim;
  return static_cast<std::size_t>(elements) * (item_type_ == ItemType::kFloat32 ? 4 : 2);
}

OnnxRuntimeSession::Cache OnnxRuntimeSession::allocate(const std::string& name, std::int64_t heads,
                                                       std::int64_t dim) const {
  Cache cache{name, heads, dim, nullptr};
  const std::size_t size = (bytes(cache) + kAlignment - 1) / kAlignment * kAlignment;
  // What has not been written stays undefined: the op never reads it.
  cache.data.reset(static_cast<char*>(std::aligned_alloc(kAlignment, size)));
  require(cache.data != nullptr, "there is no memory for a KV cache of " + std::to_string(batch_) +
                                     " rows of " + std::to_string(capacity_) +
                                     " tokens; lower max_seq, or give shorter or fewer prompts");
  return cache;
}

OnnxRuntimeSession::Caches OnnxRuntimeSession::allocate_all() const {
  Caches caches;
  for (std::int64_t layer = 0; layer < geometry_.num_layers; ++layer) {
    if (!geometry_.has_cache(layer)) continue;
    caches.push_back(
        allocate(layer_name("key", layer), geometry_.cached_heads(heads_, layer), geometry_.head_dim));
    caches.push_back(allocate(layer_name("value", layer), geometry_.num_kv_heads, geometry_.value_head_dim));
  }
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
  logits_.assign(static_cast<std::size_t>(batch * geometry_.vocab_size), 0.0f);
  raw_logits_.assign(half_logits_ ? logits_.size() : 0, Ort::Float16_t());
  bind();
}

void OnnxRuntimeSession::grow(std::int64_t capacity) {
  bindings_.clear();
  Caches old = std::move(caches_[turn_ % caches_.size()]);
  caches_.clear();  // the other set holds nothing yet: its memory is given back before more is asked for
  const std::int64_t used = capacity_;
  Caches larger;
  for (Cache& cache : old) {
    const auto rows = static_cast<std::size_t>(batch_ * cache.heads);
    capacity_ = used;
    const std::size_t from = bytes(cache) / rows;
    capacity_ = capacity;
    larger.push_back(allocate(cache.name, cache.heads, cache.dim));
    const std::size_t to = bytes(cache) / rows;
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
  const std::int64_t shape[] = {batch_, cache.heads, capacity_, cache.dim};
  return Ort::Value::CreateTensor(memory_, cache.data.get(), bytes(cache), shape, 4, onnx_type(item_type_));
}

template <typename T>
Ort::Value OnnxRuntimeSession::value(const std::vector<T>& data,
                                     const std::vector<std::int64_t>& shape) const {
  // ONNX Runtime has no tensors over constant memory; inputs are only read.
  return Ort::Value::CreateTensor<T>(memory_, const_cast<T*>(data.data()), data.size(), shape.data(),
                                     shape.size());
}

void OnnxRuntimeSession::bind() {
  const std::vector<std::int64_t> map_shape{geometry_.num_layers, batch_, geometry_.num_query_heads};
  const std::vector<std::int64_t> logits_shape{batch_, 1, geometry_.vocab_size};
  for (std::size_t turn = 0; turn < 2; ++turn) {
    Ort::IoBinding binding(session_);
    const Caches& past = caches_[turn % caches_.size()];
    const Caches& present = caches_[(turn + 1) % caches_.size()];
    for (std::size_t i = 0; i < past.size(); ++i) {
      binding.BindInput(("past_" + past[i].name).c_str(), value(past[i]));
      binding.BindOutput(("present_" + present[i].name).c_str(), value(present[i]));
    }
    binding.BindInput("head_map", value(head_maps_[turn], map_shape));
    binding.BindOutput("present_head_map", value(head_maps_[1 - turn], map_shape));
    binding.BindOutput("logits",
                       half_logits_ ? value(raw_logits_, logits_shape) : value(logits_, logits_shape));
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
  std::transform(raw_logits_.begin(), raw_logits_.end(), logits_.begin(),
                 [](Ort::Float16_t half) { return half_to_float(half.val); });
  return logits_;
}

void OnnxRuntimeSession::run(const Step& step) {
  Ort::IoBinding& binding = bindings_[turn_];
  const std::int64_t tokens = static_cast<std::int64_t>(step.input_ids.size()) / batch_;
  binding.BindInput("input_ids", value(step.input_ids, {batch_, tokens}));
  binding.BindInput("lengths", value(step.lengths, {batch_}));
  binding.BindInput("past_lengths", value(step.past_lengths, {batch_}));
  binding.BindInput("output_positions", value(step.output_positions, {batch_, 1}));
  session_.Run(Ort::RunOptions(), binding);
}

}  // namespace chai
