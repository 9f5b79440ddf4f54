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
#include "runner/graph_names.h"
#include "runner/memory.h"
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

std::int64_t item_bytes(nvinfer1::DataType type) {
  if (type == nvinfer1::DataType::kFLOAT) return 4;
  return type == nvinfer1::DataType::kINT8 ? 1 : 2;
}

// What TensorRT asks of addresses.
constexpr std::size_t kAlignment = 256;

std::string layer_name(const char* kind, std::int64_t layer) {
  return kind + ("." + std::to_string(layer));
}

// Decode steps change their shape when a row doubles, not with each page.
std::int64_t next_power_of_two(std::int64_t number) {
  std::int64_t power = 1;
  while (power < number) power *= 2;
  return power;
}

}  // namespace

TensorRtSession::TensorRtSession(const std::string& plan, const std::string& plugin, Heads heads,
                                 std::int64_t cache_memory)
    : cache_memory_(cache_memory) {
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
  read_pools();
  std::int64_t scratch = 0;
  for (const Profile profile : {kPrefill, kDecode})
    scratch = std::max<std::int64_t>(scratch, engine_->getDeviceMemorySizeForProfileV2(profile));
  if (scratch > 0) scratch_ = DeviceMemory(static_cast<std::size_t>(scratch));
  prefill_ = make_context(kPrefill);
  spare_.push_back(make_context(kDecode));
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
  const nvinfer1::Dims head_map = most(graph::kHeadMap);
  const nvinfer1::Dims input_ids = most(graph::kInputIds);
  for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
    const std::string input = engine_->getIOTensorName(i);
    if (input.rfind(graph::kPageTable, 0) == 0) page_tables_.push_back(input);
  }
  require(!page_tables_.empty(), "the engine has no page_table; build it again");
  const nvinfer1::Dims table = most(page_tables_[0]);
  const nvinfer1::Dims value = most(layer_name(graph::kPastValue, 0));
  require(head_map.nbDims == 3 && input_ids.nbDims == 2 && table.nbDims == 2 && value.nbDims == 4,
          "the engine is not one of chai_export with caches in pages; build it again");
  geometry_.num_layers = head_map.d[0];
  geometry_.num_query_heads = head_map.d[2];
  max_batch_ = input_ids.d[0];
  max_tokens_ = input_ids.d[1];
  max_row_pages_ = table.d[1];
  geometry_.num_kv_heads = value.d[1];
  page_length_ = value.d[2];
  geometry_.vocab_size = engine_->getTensorShape(graph::kLogits).d[2];
  for (std::int64_t layer = 0; layer < geometry_.num_layers; ++layer) {
    const std::string name = layer_name(graph::kPastKey, layer);
    // The profile's least number of kept heads is the bundle's.
    const nvinfer1::Dims least =
        engine_->getProfileShape(name.c_str(), kPrefill, nvinfer1::OptProfileSelector::kMIN);
    require(least.nbDims == 4, "the engine has no " + name);
    geometry_.kept_heads.push_back(least.d[1]);
    geometry_.kv_source_layers.push_back(layer);
    cached_heads_.push_back(geometry_.cached_heads(heads, layer));
  }
}

void TensorRtSession::read_pools() {
  const std::size_t prefix = std::strlen(graph::kPast);
  for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
    const std::string input = engine_->getIOTensorName(i);
    const std::size_t dot = input.find('.');
    if (input.rfind(graph::kPast, 0) != 0 || dot == std::string::npos) continue;
    const bool is_key = input.rfind(graph::kPastKey, 0) == 0;
    const auto layer = static_cast<std::size_t>(std::stoul(input.substr(dot + 1)));
    require(layer < cached_heads_.size(), "the engine has no layer of " + input);
    const nvinfer1::Dims shape = engine_->getTensorShape(input.c_str());
    require(shape.nbDims == 4, "the engine's " + input + " is no pool of pages");
    pools_.push_back({input.substr(prefix),
                      is_key ? cached_heads_[layer] : geometry_.num_kv_heads,
                      shape.d[3],
                      item_bytes(engine_->getTensorDataType(input.c_str())),
                      {}});
  }
}

TensorRtSession::Context TensorRtSession::make_context(Profile profile) const {
  Context context(
      engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
  require(context != nullptr, "TensorRT could not make an execution context (see its message)");
  require(context->setOptimizationProfileAsync(profile, stream_.get()), "the engine lacks a profile");
  context->setDeviceMemoryV2(scratch_.data(), static_cast<std::int64_t>(scratch_.bytes()));
  require(cudaStreamSynchronize(stream_.get()), "choosing a profile");
  return context;
}

std::int64_t TensorRtSession::page_bytes() const {
  std::int64_t bytes = 0;
  for (const Pool& pool : pools_) bytes += pool.heads * pool.columns * pool.item_bytes;
  return bytes * page_length_;
}

Session::Room TensorRtSession::room() const {
  std::size_t free = 0;
  std::size_t total = 0;
  require(cudaMemGetInfo(&free, &total), "asking for free GPU memory");
  Budget budget = budget_of(cache_memory_, static_cast<std::int64_t>(free), "GPU memory");
  return {budget.size / page_bytes() * page_length_, std::move(budget)};
}

void TensorRtSession::drop() {
  for (auto& [_, decode] : decodes_) spare_.push_back(std::move(decode.context));
  decodes_.clear();
  for (Pool& pool : pools_) pool.memory = DeviceMemory();
  pool_ = PagePool(0, page_length_);
  maps_ = RowMaps();
  rows_ = longest_ = 0;
}

void TensorRtSession::start(std::int64_t rows, std::int64_t pages) {
  require(rows >= 1 && rows <= max_batch_,
          "the engine takes 1 to " + std::to_string(max_batch_) + " rows; build with a higher --max-batch");
  drop();
  for (Pool& pool : pools_)
    pool.memory = DeviceMemory(
        static_cast<std::size_t>(pages * pool.heads * page_length_ * pool.columns * pool.item_bytes));
  pool_ = PagePool(pages, page_length_);
  maps_ = RowMaps(geometry_.num_layers, rows, geometry_.num_query_heads);
  rows_ = rows;
}

bool TensorRtSession::promise(std::int64_t row, std::int64_t tokens) {
  require(tokens <= max_capacity(), "the engine takes rows of up to " + std::to_string(max_capacity()) +
                                        " tokens; build with a higher --max-seq");
  if (!pool_.promise(row, tokens)) return false;
  longest_ = std::max(longest_, tokens);
  return true;
}

TensorRtSession::Feeds TensorRtSession::make_feeds(const Sizes& sizes) const {
  Feeds feeds;
  const auto lay = [](std::size_t& end, const char* name, const nvinfer1::Dims& shape, std::int64_t item) {
    std::int64_t bytes = item;
    for (std::int32_t axis = 0; axis < shape.nbDims; ++axis) bytes *= shape.d[axis];
    const Part part{name, shape, end, static_cast<std::size_t>(bytes)};
    end += (part.bytes + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  };
  const nvinfer1::Dims maps = dims({geometry_.num_layers, sizes.rows, geometry_.num_query_heads});
  std::size_t fed = 0;
  feeds.inputs = {lay(fed, graph::kInputIds, dims({sizes.rows, sizes.tokens}), sizeof(std::int64_t)),
                  lay(fed, graph::kLengths, dims({sizes.rows}), sizeof(std::int32_t)),
                  lay(fed, graph::kPastLengths, dims({sizes.rows}), sizeof(std::int32_t)),
                  lay(fed, graph::kOutputPositions, dims({sizes.rows, sizes.outputs}), sizeof(std::int64_t)),
                  lay(fed, graph::kHeadMap, maps, sizeof(std::int32_t))};
  for (const std::string& name : page_tables_)
    feeds.inputs.push_back(lay(fed, name.c_str(), dims({sizes.rows, sizes.row_pages}), sizeof(std::int32_t)));
  feeds.fed = DeviceMemory(fed);
  std::size_t made = 0;
  feeds.logits = lay(made, graph::kLogits, dims({sizes.rows, sizes.outputs, geometry_.vocab_size}),
                     item_bytes(engine_->getTensorDataType(graph::kLogits)));
  feeds.head_map = lay(made, graph::kPresentHeadMap, maps, sizeof(std::int32_t));
  feeds.made = DeviceMemory(made);
  return feeds;
}

// The buffers are free: every step ends with the stream done.
void TensorRtSession::fill(const Feeds& feeds, const Step& step, const std::vector<std::int64_t>& rows) {
  const auto row_pages = static_cast<std::size_t>(feeds.inputs.back().shape.d[1]);
  const auto held = static_cast<std::size_t>(pool_.most_pages(rows));
  const std::vector<std::int32_t> narrow = pool_.table(rows);
  std::vector<std::int32_t> table(rows.size() * row_pages, -1);
  for (std::size_t row = 0; row < rows.size(); ++row)
    std::copy_n(narrow.data() + row * held, held, table.data() + row * row_pages);
  const std::vector<std::int32_t> maps = maps_.of(rows);
  std::vector<const void*> contents{step.input_ids.data(), step.lengths.data(), step.past_lengths.data(),
                                    step.output_positions.data(), maps.data()};
  contents.resize(feeds.inputs.size(), table.data());  // layers with a window hold all pages of a row too
  char* staged = staged_.at_least(feeds.fed.bytes());
  for (std::size_t i = 0; i < feeds.inputs.size(); ++i)
    std::memcpy(staged + feeds.inputs[i].offset, contents[i], feeds.inputs[i].bytes);
  require(cudaMemcpyAsync(feeds.fed.data(), staged, feeds.fed.bytes(), cudaMemcpyHostToDevice, stream_.get()),
          "copying inputs");
}

void TensorRtSession::bind(nvinfer1::IExecutionContext& context, const Feeds& feeds) const {
  const auto address = [&](const std::string& name, void* data) {
    require(context.setTensorAddress(name.c_str(), data), "TensorRT refuses the address of " + name);
  };
  const auto input = [&](const std::string& name, const nvinfer1::Dims& shape, void* data) {
    require(context.setInputShape(name.c_str(), shape), "the engine does not take this shape of " + name +
                                                            "; build it with a higher --max-batch or "
                                                            "--max-seq");
    address(name, data);
  };
  for (const Part& part : feeds.inputs) input(part.name, part.shape, feeds.fed.data() + part.offset);
  for (const Pool& pool : pools_) {
    // In place: the plugin appends to the pool it reads.
    input(graph::kPast + pool.name, dims({pool_.pages(), pool.heads, page_length_, pool.columns}),
          pool.memory.data());
    address(graph::kPresent + pool.name, pool.memory.data());
  }
  for (const Part& part : {feeds.logits, feeds.head_map}) address(part.name, feeds.made.data() + part.offset);
}

void TensorRtSession::execute(nvinfer1::IExecutionContext& context) const {
  require(context.enqueueV3(stream_.get()), "TensorRT could not run the step (see its message)");
}

void TensorRtSession::check(const Step& step, const std::vector<std::int64_t>& rows) const {
  const std::size_t count = rows.size();
  require(rows_ > 0, "call start first");
  require(count > 0 && step.lengths.size() == count && step.past_lengths.size() == count &&
              !step.input_ids.empty() && !step.output_positions.empty() &&
              step.input_ids.size() % count == 0 && step.output_positions.size() % count == 0,
          "input sizes do not fit the rows");
  const auto tokens = static_cast<std::int64_t>(step.input_ids.size() / count);
  for (std::size_t line = 0; line < count; ++line) {
    require(rows[line] >= 0 && rows[line] < rows_, "there is no row " + std::to_string(rows[line]));
    require(step.lengths[line] >= 1 && step.lengths[line] <= tokens && step.past_lengths[line] >= 0,
            "the lengths of row " + std::to_string(rows[line]) + " do not fit its tokens");
  }
}

TensorRtSession::Sizes TensorRtSession::sizes_of(const Step& step,
                                                 const std::vector<std::int64_t>& rows) const {
  const auto count = static_cast<std::int64_t>(rows.size());
  return {count, static_cast<std::int64_t>(step.input_ids.size()) / count,
          static_cast<std::int64_t>(step.output_positions.size()) / count,
          std::min(next_power_of_two(pool_.most_pages(rows)), max_row_pages_)};
}

const std::vector<float>& TensorRtSession::step(const Step& step, const std::vector<std::int64_t>& rows) {
  check(step, rows);
  for (std::size_t line = 0; line < rows.size(); ++line)
    pool_.extend(rows[line], std::int64_t{step.past_lengths[line]} + step.lengths[line]);
  const Sizes sizes = sizes_of(step, rows);
  if (sizes.tokens == 1 && sizes.outputs == 1) return read(decode(sizes, step, rows), step, rows);
  const Feeds feeds = make_feeds(sizes);
  fill(feeds, step, rows);
  bind(*prefill_, feeds);
  execute(*prefill_);
  return read(feeds, step, rows);
}

const TensorRtSession::Feeds& TensorRtSession::decode(const Sizes& sizes, const Step& step,
                                                      const std::vector<std::int64_t>& rows) {
  const std::pair<std::int64_t, std::int64_t> shape{sizes.rows, sizes.row_pages};
  const auto found = decodes_.find(shape);
  if (found == decodes_.end()) {
    Decode fresh{decode_context(), make_feeds(sizes), nullptr, ++decode_steps_};
    fill(fresh.feeds, step, rows);
    bind(*fresh.context, fresh.feeds);
    execute(*fresh.context);  // outside the graph: TensorRT prepares for the new shapes in it
    return decodes_.emplace(shape, std::move(fresh)).first->second.feeds;
  }
  Decode& known = found->second;
  known.used = ++decode_steps_;
  fill(known.feeds, step, rows);
  if (known.graph == nullptr) capture(known);
  require(cudaGraphLaunch(known.graph.get(), stream_.get()), "launching the decode graph");
  return known.feeds;
}

TensorRtSession::Context TensorRtSession::decode_context() {
  if (decodes_.size() == kMostGraphs) {
    const auto oldest = std::min_element(decodes_.begin(), decodes_.end(), [](const auto& a, const auto& b) {
      return a.second.used < b.second.used;
    });
    spare_.push_back(std::move(oldest->second.context));
    decodes_.erase(oldest);
  }
  if (spare_.empty()) return make_context(kDecode);
  Context context = std::move(spare_.back());
  spare_.pop_back();
  return context;
}

void TensorRtSession::capture(Decode& decode) const {
  require(cudaStreamSynchronize(stream_.get()), "waiting before a capture");
  // Other threads of the program may go on allocating.
  require(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "beginning a capture");
  cudaGraph_t captured = nullptr;
  try {
    execute(*decode.context);
  } catch (...) {
    cudaStreamEndCapture(stream_.get(), &captured);
    if (captured != nullptr) cudaGraphDestroy(captured);
    throw;
  }
  require(cudaStreamEndCapture(stream_.get(), &captured), "ending a capture");
  const Owned<cudaGraph_t> graph(captured);
  cudaGraphExec_t executable = nullptr;
  require(cudaGraphInstantiate(&executable, graph.get(), 0), "instantiating the decode graph");
  decode.graph.reset(executable);
}

const std::vector<float>& TensorRtSession::read(const Feeds& feeds, const Step& step,
                                                const std::vector<std::int64_t>& rows) {
  // The maps of other rows stay what they were.
  const bool fresh = std::count(step.past_lengths.begin(), step.past_lengths.end(), 0) > 0;
  const std::size_t wanted = fresh ? feeds.made.bytes() : feeds.logits.bytes;
  char* raw = fetched_.at_least(feeds.made.bytes());
  require(cudaMemcpyAsync(raw, feeds.made.data(), wanted, cudaMemcpyDeviceToHost, stream_.get()),
          "copying logits");
  require(cudaStreamSynchronize(stream_.get()), "running the step");
  if (fresh) {
    std::vector<std::int32_t> maps(feeds.head_map.bytes / sizeof(std::int32_t));
    std::memcpy(maps.data(), raw + feeds.head_map.offset, feeds.head_map.bytes);
    maps_.keep(rows, maps.data());
  }
  const nvinfer1::DataType type = engine_->getTensorDataType(graph::kLogits);
  logits_.resize(feeds.logits.bytes / static_cast<std::size_t>(item_bytes(type)));
  if (type == nvinfer1::DataType::kFLOAT) {
    std::memcpy(logits_.data(), raw, feeds.logits.bytes);
    return logits_;
  }
  for (std::size_t i = 0; i < logits_.size(); ++i) {
    std::uint16_t half = 0;
    std::memcpy(&half, raw + 2 * i, sizeof(half));
    logits_[i] = type == nvinfer1::DataType::kHALF ? half_to_float(half) : bfloat16_to_float(half);
  }
  return logits_;
}

}  // namespace chai
