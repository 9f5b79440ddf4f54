#include "runner/backends/tensorrt/session.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "op/cuda/cuda_error.h"
#include "op/tensorrt/names.h"
#include "support/error.h"
#include "support/half.h"
#include "support/log.h"

namespace chai {
namespace {

class StderrLogger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) log_to_stderr("TensorRT", message);
  }
};

// TensorRT keeps a pointer to it for the life of the process.
StderrLogger& logger() {
  static StderrLogger instance;
  return instance;
}

using chai::require;
using cuda::require;

std::vector<char> read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::vector<char> content{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  require(stream.is_open() && !content.empty(), "cannot read " + path);
  return content;
}

nvinfer1::Dims dims(std::initializer_list<std::int64_t> sizes) {
  nvinfer1::Dims result{};
  for (const std::int64_t size : sizes) result.d[result.nbDims++] = size;
  return result;
}

std::size_t item_bytes(nvinfer1::DataType type) {
  return type == nvinfer1::DataType::kFLOAT ? 4 : 2;
}

std::string layer_name(const char* kind, std::size_t layer) {
  return kind + ("." + std::to_string(layer));
}

}  // namespace

TensorRtSession::Buffer::Buffer(std::size_t bytes) : bytes_(bytes) {
  require(cudaMalloc(&data_, bytes), "allocating GPU memory");
}

TensorRtSession::Buffer::~Buffer() {
  cudaFree(data_);
}

TensorRtSession::Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

TensorRtSession::Buffer& TensorRtSession::Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

TensorRtSession::TensorRtSession(const std::string& plan, const std::string& plugin, Heads heads) {
  const std::vector<char> bytes = read_file(plan);
  cudaStream_t stream = nullptr;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a CUDA stream");
  stream_.reset(stream);
  runtime_.reset(nvinfer1::createInferRuntime(logger()));
  require(runtime_ != nullptr, "TensorRT does not start (see its message)");
  load_plugin(plugin);
  engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
  require(engine_ != nullptr, plan + " does not load; build it on this GPU and with this TensorRT");
  read_geometry(heads);
  make_contexts();
}

TensorRtSession::~TensorRtSession() {
  cudaStreamSynchronize(stream_.get());
}

void TensorRtSession::load_plugin(const std::string& library) {
  nvinfer1::IPluginRegistry& registry = runtime_->getPluginRegistry();
  // A library that the program has loaded by itself would be refused.
  if (registry.getCreator(tensorrt::kPluginName, tensorrt::kPluginVersion, tensorrt::kPluginNamespace))
    return;
  require(registry.loadLibrary(library.c_str()) != nullptr,
          library + " does not load (see TensorRT's message)");
}

void TensorRtSession::read_geometry(Heads heads) {
  const auto most = [&](const std::string& name) {
    return engine_->getProfileShape(name.c_str(), kPrefill, nvinfer1::OptProfileSelector::kMAX);
  };
  const nvinfer1::Dims head_map = most("head_map");
  const nvinfer1::Dims input_ids = most("input_ids");
  const nvinfer1::Dims value = most("past_value.0");
  require(head_map.nbDims == 3 && input_ids.nbDims == 2 && value.nbDims == 4,
          "the engine is not one of chai_export");
  geometry_.num_layers = head_map.d[0];
  geometry_.num_query_heads = head_map.d[2];
  max_batch_ = input_ids.d[0];
  max_tokens_ = input_ids.d[1];
  geometry_.num_kv_heads = value.d[1];
  max_capacity_ = value.d[2];
  geometry_.value_head_dim = value.d[3];
  geometry_.vocab_size = engine_->getTensorShape("logits").d[2];
  for (std::int64_t layer = 0; layer < geometry_.num_layers; ++layer) {
    const std::string name = layer_name("past_key", static_cast<std::size_t>(layer));
    // The profile's least number of kept heads is the bundle's.
    const nvinfer1::Dims least =
        engine_->getProfileShape(name.c_str(), kPrefill, nvinfer1::OptProfileSelector::kMIN);
    require(least.nbDims == 4, "the engine has no " + name);
    geometry_.head_dim = least.d[3];
    geometry_.kept_heads.push_back(least.d[1]);
    geometry_.kv_source_layers.push_back(layer);
    cached_heads_.push_back(geometry_.cached_heads(heads, layer));
  }
}

void TensorRtSession::make_contexts() {
  std::int64_t scratch = 0;
  for (const Profile profile : {kPrefill, kDecode})
    scratch = std::max<std::int64_t>(scratch, engine_->getDeviceMemorySizeForProfileV2(profile));
  if (scratch > 0) scratch_ = Buffer(static_cast<std::size_t>(scratch));
  for (const Profile profile : {kPrefill, kDecode}) {
    auto& context = contexts_[profile];
    context.reset(
        engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    require(context != nullptr, "TensorRT could not make an execution context (see its message)");
    require(context->setOptimizationProfileAsync(profile, stream_.get()), "the engine lacks a profile");
    context->setDeviceMemoryV2(scratch_.get(), scratch);
  }
  require(cudaStreamSynchronize(stream_.get()), "choosing profiles");
}

void TensorRtSession::begin(std::int64_t batch, std::int64_t capacity) {
  require(batch >= 1 && batch <= max_batch_,
          "the engine takes 1 to " + std::to_string(max_batch_) + " rows; build with a higher --max-batch");
  require(
      capacity >= 1 && capacity <= max_capacity_,
      "the engine takes 1 to " + std::to_string(max_capacity_) + " tokens; build with a higher --max-seq");
  drop_decode();
  batch_ = batch;
  capacity_ = capacity;
  caches_.clear();
  allocate_caches();
  const auto maps = static_cast<std::size_t>(geometry_.num_layers * batch * geometry_.num_query_heads) *
                    sizeof(std::int32_t);
  head_map_ = Buffer(maps);
  present_head_map_ = Buffer(maps);
  require(cudaMemsetAsync(head_map_.get(), 0, maps, stream_.get()), "clearing the head map");
}

void TensorRtSession::allocate_caches() {
  for (std::size_t layer = 0; layer < cached_heads_.size(); ++layer) {
    const std::string key = layer_name("key", layer);
    const std::string value = layer_name("value", layer);
    const auto bytes = [&](const std::string& name, std::int64_t heads) {
      const std::string past = "past_" + name;
      const std::int64_t elements = batch_ * heads * capacity_ * engine_->getTensorShape(past.c_str()).d[3];
      return static_cast<std::size_t>(elements) * item_bytes(engine_->getTensorDataType(past.c_str()));
    };
    caches_[key] = Buffer(bytes(key, cached_heads_[layer]));
    caches_[value] = Buffer(bytes(value, geometry_.num_kv_heads));
  }
}

TensorRtSession::Feeds TensorRtSession::make_feeds(std::int64_t tokens, std::int64_t outputs) const {
  const auto rows = static_cast<std::size_t>(batch_);
  Feeds feeds;
  feeds.tokens = tokens;
  feeds.outputs = outputs;
  feeds.inputs["input_ids"] = Buffer(rows * static_cast<std::size_t>(tokens) * sizeof(std::int64_t));
  feeds.inputs["lengths"] = Buffer(rows * sizeof(std::int32_t));
  feeds.inputs["past_lengths"] = Buffer(rows * sizeof(std::int32_t));
  feeds.inputs["output_positions"] = Buffer(rows * static_cast<std::size_t>(outputs) * sizeof(std::int64_t));
  const auto logits = rows * static_cast<std::size_t>(outputs * geometry_.vocab_size);
  feeds.logits = Buffer(logits * item_bytes(engine_->getTensorDataType("logits")));
  return feeds;
}

void TensorRtSession::fill(const Feeds& feeds, const Step& step) {
  const auto copy = [&](const char* name, const void* data) {
    const Buffer& buffer = feeds.inputs.at(name);
    require(cudaMemcpyAsync(buffer.get(), data, buffer.bytes(), cudaMemcpyHostToDevice, stream_.get()),
            "copying inputs");
  };
  copy("input_ids", step.input_ids.data());
  copy("lengths", step.lengths.data());
  copy("past_lengths", step.past_lengths.data());
  copy("output_positions", step.output_positions.data());
}

void TensorRtSession::bind(Profile profile, const Feeds& feeds) {
  nvinfer1::IExecutionContext& context = *contexts_[profile];
  const auto input = [&](const std::string& name, const nvinfer1::Dims& shape, void* address) {
    require(context.setInputShape(name.c_str(), shape), "the engine does not take this shape of " + name);
    require(context.setTensorAddress(name.c_str(), address), "TensorRT refuses the address of " + name);
  };
  input("input_ids", dims({batch_, feeds.tokens}), feeds.inputs.at("input_ids").get());
  input("lengths", dims({batch_}), feeds.inputs.at("lengths").get());
  input("past_lengths", dims({batch_}), feeds.inputs.at("past_lengths").get());
  input("output_positions", dims({batch_, feeds.outputs}), feeds.inputs.at("output_positions").get());
  input("head_map", dims({geometry_.num_layers, batch_, geometry_.num_query_heads}), head_map_.get());
  for (const auto& [name, cache] : caches_) {
    nvinfer1::Dims shape = engine_->getTensorShape(("past_" + name).c_str());
    const bool is_key = name.rfind("key.", 0) == 0;
    shape.d[0] = batch_;
    shape.d[1] = is_key ? cached_heads_[std::stoul(name.substr(4))] : geometry_.num_kv_heads;
    shape.d[2] = capacity_;
    input("past_" + name, shape, cache.get());
    // In place: the plugin appends to the buffer it reads.
    require(context.setTensorAddress(("present_" + name).c_str(), cache.get()), "TensorRT refuses a cache");
  }
  require(context.setTensorAddress("present_head_map", present_head_map_.get()),
          "TensorRT refuses the head map");
  require(context.setTensorAddress("logits", feeds.logits.get()), "TensorRT refuses the logits");
}

void TensorRtSession::execute(Profile profile) {
  require(contexts_[profile]->enqueueV3(stream_.get()), "TensorRT could not run the step (see its message)");
  require(cudaMemcpyAsync(head_map_.get(), present_head_map_.get(), head_map_.bytes(),
                          cudaMemcpyDeviceToDevice, stream_.get()),
          "keeping the head map");
}

void TensorRtSession::grow(std::int64_t capacity) {
  throw std::logic_error("a TensorRT session cannot grow to " + std::to_string(capacity));
}

const std::vector<float>& TensorRtSession::step(const Step& step) {
  const auto rows = static_cast<std::size_t>(batch_);
  require(rows > 0, "call begin first");
  require(step.lengths.size() == rows && step.past_lengths.size() == rows && !step.input_ids.empty() &&
              !step.output_positions.empty() && step.input_ids.size() % rows == 0 &&
              step.output_positions.size() % rows == 0,
          "input sizes do not fit the batch");
  const auto tokens = static_cast<std::int64_t>(step.input_ids.size() / rows);
  const auto outputs = static_cast<std::int64_t>(step.output_positions.size() / rows);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::int32_t length = step.lengths[row];
    const std::int32_t past = step.past_lengths[row];
    require(length >= 0 && length <= tokens && past >= 0 && (length == 0 || past + length <= capacity_),
            "row " + std::to_string(row) + " does not fit its cache");
  }
  if (tokens != 1 || outputs != 1) {
    const Feeds feeds = make_feeds(tokens, outputs);
    fill(feeds, step);
    bind(kPrefill, feeds);
    execute(kPrefill);
    return read_logits(feeds);
  }
  if (decode_ == nullptr) {
    decode_ = std::make_unique<Feeds>(make_feeds(1, 1));
    fill(*decode_, step);
    bind(kDecode, *decode_);
    execute(kDecode);  // outside the graph: TensorRT prepares for the new shapes in it
    return read_logits(*decode_);
  }
  fill(*decode_, step);
  if (decode_graph_ == nullptr) capture_decode();
  require(cudaGraphLaunch(decode_graph_.get(), stream_.get()), "launching the decode graph");
  return read_logits(*decode_);
}

void TensorRtSession::capture_decode() {
  require(cudaStreamSynchronize(stream_.get()), "waiting before a capture");
  // Other threads of the program may go on allocating.
  require(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "beginning a capture");
  cudaGraph_t captured = nullptr;
  try {
    execute(kDecode);
  } catch (...) {
    cudaStreamEndCapture(stream_.get(), &captured);
    if (captured != nullptr) cudaGraphDestroy(captured);
    throw;
  }
  require(cudaStreamEndCapture(stream_.get(), &captured), "ending a capture");
  const Owned<cudaGraph_t> graph(captured);
  cudaGraphExec_t executable = nullptr;
  require(cudaGraphInstantiate(&executable, graph.get(), 0), "instantiating the decode graph");
  decode_graph_.reset(executable);
}

void TensorRtSession::drop_decode() {
  decode_graph_.reset();
  decode_.reset();
}

const std::vector<float>& TensorRtSession::read_logits(const Feeds& feeds) {
  std::vector<char> raw(feeds.logits.bytes());
  require(cudaMemcpyAsync(raw.data(), feeds.logits.get(), raw.size(), cudaMemcpyDeviceToHost, stream_.get()),
          "copying logits");
  require(cudaStreamSynchronize(stream_.get()), "running the step");
  const nvinfer1::DataType type = engine_->getTensorDataType("logits");
  logits_.resize(raw.size() / item_bytes(type));
  if (type == nvinfer1::DataType::kFLOAT) {
    std::memcpy(logits_.data(), raw.data(), raw.size());
    return logits_;
  }
  for (std::size_t i = 0; i < logits_.size(); ++i) {
    std::uint16_t half = 0;
    std::memcpy(&half, raw.data() + 2 * i, sizeof(half));
    logits_[i] = type == nvinfer1::DataType::kHALF ? half_to_float(half) : bfloat16_to_float(half);
  }
  return logits_;
}

std::vector<std::int32_t> TensorRtSession::head_map() const {
  std::vector<std::int32_t> map(head_map_.bytes() / sizeof(std::int32_t));
  require(
      cudaMemcpyAsync(map.data(), head_map_.get(), head_map_.bytes(), cudaMemcpyDeviceToHost, stream_.get()),
      "copying the head map");
  require(cudaStreamSynchronize(stream_.get()), "copying the head map");
  return map;
}

}  // namespace chai
