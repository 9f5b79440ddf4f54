#include "tests/played/played.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "support/half.h"

using chai::test::played;

struct CUstream_st {
  std::vector<std::function<void()>>* capture = nullptr;
};
struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};
struct CUlib_st {
  std::string content;
};
struct CUkern_st {
  std::string name;
};

namespace {

chai::test::Played state;

// Work of a stream is done at once, or kept while it is captured.
void submit(cudaStream_t stream, std::function<void()> work) {
  if (stream != nullptr && stream->capture != nullptr) {
    stream->capture->push_back(std::move(work));
  } else {
    work();
  }
}

const char* name_of(const void* kernel) {
  return static_cast<const CUkern_st*>(kernel)->name.c_str();
}

}  // namespace

namespace chai::test {

Played& played() {
  return state;
}

void play_afresh() {
  state = {};
}

}  // namespace chai::test

// --- CUDA ------------------------------------------------------------------------------------------------

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "played failure";
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (played().no_memory) return cudaErrorMemoryAllocation;
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xee, bytes);
  ++played().allocations;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory != nullptr) --played().allocations;
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
  return cudaMalloc(memory, bytes);
}

cudaError_t cudaFreeHost(void* memory) {
  return cudaFree(memory);
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = played().free_memory;
  *total = 2 * *free;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (kind == cudaMemcpyHostToDevice) ++played().copies;
  submit(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  submit(stream, [=] { std::memset(memory, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
  if (properties->allocType != cudaMemAllocationTypePinned) return cudaErrorUnknown;
  *pool = reinterpret_cast<cudaMemPool_t>(&state);
  ++played().pools;
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr attribute, void* value) {
  const bool keeps = attribute == cudaMemPoolAttrReleaseThreshold && *static_cast<std::uint64_t*>(value) > 0;
  return keeps ? cudaSuccess : cudaErrorUnknown;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t) {
  --played().pools;
  return cudaSuccess;
}

cudaError_t cudaMallocFromPoolAsync(void** memory, std::size_t bytes, cudaMemPool_t, cudaStream_t) {
  // The size lies before the memory, at a distance that keeps it aligned.
  constexpr std::size_t kAlignment = 256;
  auto* start = static_cast<char*>(std::aligned_alloc(kAlignment, kAlignment * (bytes / kAlignment + 2)));
  std::memcpy(start, &bytes, sizeof(bytes));
  *memory = start + kAlignment;
  played().pool_bytes += bytes;
  played().most_pool_bytes = std::max(played().most_pool_bytes, played().pool_bytes);
  return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  char* start = static_cast<char*>(memory) - 256;
  std::size_t bytes = 0;
  std::memcpy(&bytes, start, sizeof(bytes));
  played().pool_bytes -= bytes;
  std::free(start);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  if (played().no_stream) return cudaErrorUnknown;
  *stream = new CUstream_st;
  ++played().streams;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  --played().streams;
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  played().captures.push_back(mode);
  stream->capture = new std::vector<std::function<void()>>;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = new CUgraph_st{std::move(*stream->capture)};
  ++played().graphs;
  delete stream->capture;
  stream->capture = nullptr;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{graph->work};
  ++played().graphs;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  ++played().replays;
  for (const auto& work : executable->work) work();
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  --played().graphs;
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  --played().graphs;
  delete executable;
  return cudaSuccess;
}

cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
  // A cubin tells its own length; played ones end with a zero.
  const std::string content = static_cast<const char*>(code);
  played().code.push_back({reinterpret_cast<std::uintptr_t>(code), content});
  *library = new CUlib_st{content};
  ++played().libraries;
  return cudaSuccess;
}

cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name) {
  static std::vector<std::unique_ptr<CUkern_st>> kernels;
  if (library->content.find(name) == std::string::npos) return cudaErrorUnknown;
  *kernel = kernels.emplace_back(std::make_unique<CUkern_st>(CUkern_st{name})).get();
  return cudaSuccess;
}

cudaError_t cudaLibraryUnload(cudaLibrary_t library) {
  --played().libraries;
  delete library;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int architecture = played().architecture;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? architecture / 10 : architecture % 10;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  played().shared_bytes.emplace_back(name_of(kernel), value);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, std::size_t, cudaStream_t) {
  played().launches.push_back({name_of(kernel), {grid.x, grid.y, grid.z}, block.x});
  return cudaSuccess;
}

// --- TensorRT --------------------------------------------------------------------------------------------

namespace nvinfer1 {
namespace {

constexpr std::int64_t kVocab = 50;

// Those of a pool have heads and columns.
struct Tensor {
  const char* name;
  std::int64_t heads;
  std::int64_t columns;
};

const std::vector<Tensor> tensors = {
    {"input_ids", 0, 0},        {"lengths", 0, 0},         {"past_lengths", 0, 0},
    {"output_positions", 0, 0}, {"page_table", 0, 0},      {"head_map", 0, 0},
    {"past_key.0", -1, 8},      {"past_value.0", 2, 4},    {"past_key_scales.0", -1, 2},
    {"past_key.1", -1, 8},      {"past_value.1", 2, 4},    {"past_key_scales.1", -1, 2},
    {"logits", 0, 0},           {"present_head_map", 0, 0}};

Dims dims(std::initializer_list<std::int64_t> sizes) {
  Dims result{};
  for (const std::int64_t size : sizes) result.d[result.nbDims++] = size;
  return result;
}

template <typename Item>
Item* address(const std::map<std::string, void*>& addresses, const char* name) {
  return static_cast<Item*>(addresses.at(name));
}

// One step of the played model. Every token is kept as the first code of its slot in the keys of layer 0.
void step(const std::map<std::string, void*>& addresses, const std::map<std::string, Dims>& shapes) {
  const Dims ids = shapes.at("input_ids");
  const Dims positions = shapes.at("output_positions");
  const Dims table = shapes.at("page_table");
  const Dims pool = shapes.at("past_key.0");
  const auto* tokens = address<std::int64_t>(addresses, "input_ids");
  const auto* wanted = address<std::int64_t>(addresses, "output_positions");
  const auto* pages = address<std::int32_t>(addresses, "page_table");
  const auto* pasts = address<std::int32_t>(addresses, "past_lengths");
  const auto* lengths = address<std::int32_t>(addresses, "lengths");
  const auto* old_maps = address<std::int32_t>(addresses, "head_map");
  auto* maps = address<std::int32_t>(addresses, "present_head_map");
  auto* keys = address<std::int8_t>(addresses, "present_key.0");
  auto* logits = address<std::uint16_t>(addresses, "logits");
  const Dims map = shapes.at("head_map");
  for (std::int64_t row = 0; row < ids.d[0]; ++row) {
    const auto slot = [&](std::int64_t position) {
      const std::int64_t page = pages[row * table.d[1] + position / pool.d[2]];
      return keys + ((page * pool.d[1]) * pool.d[2] + position % pool.d[2]) * pool.d[3];
    };
    // The text counts up, so what is kept tells whether pages are the row's.
    bool kept = true;
    for (std::int64_t i = 0; i < lengths[row]; ++i)
      *slot(pasts[row] + i) = static_cast<std::int8_t>(tokens[row * ids.d[1] + i]);
    for (std::int64_t i = 1; i < pasts[row] + lengths[row]; ++i) kept = kept && *slot(i) == *slot(i - 1) + 1;
    for (std::int64_t n = 0; n < positions.d[1]; ++n) {
      const std::int64_t last = tokens[row * ids.d[1] + wanted[row * positions.d[1] + n]];
      for (std::int64_t token = 0; token < kVocab; ++token)
        *logits++ = chai::half_from_float(kept && token == (last + 1) % kVocab ? 2.5f : 0.0f);
    }
    for (std::int64_t layer = 0; layer < map.d[0]; ++layer) {
      for (std::int64_t head = 0; head < map.d[2]; ++head) {
        const std::int64_t place = (layer * map.d[1] + row) * map.d[2] + head;
        maps[place] = pasts[row] == 0 ? static_cast<std::int32_t>(tokens[row * ids.d[1]]) : old_maps[place];
      }
    }
  }
  ++played().steps;
  played().calls.emplace_back(ids.d[0], ids.d[1]);
}

}  // namespace

IExecutionContext::IExecutionContext(ExecutionContextAllocationStrategy strategy_in) : strategy(strategy_in) {
  ++played().objects;
  played().contexts.push_back(this);
}

IExecutionContext::~IExecutionContext() {
  --played().objects;
}

bool IExecutionContext::setOptimizationProfileAsync(std::int32_t profile_in, cudaStream_t) noexcept {
  profile = profile_in;
  return true;
}

bool IExecutionContext::setInputShape(const char* name, const Dims& shape) noexcept {
  ++bound;
  shapes[name] = shape;
  return true;
}

bool IExecutionContext::setTensorAddress(const char* name, void* address) noexcept {
  ++bound;
  addresses[name] = address;
  return address != nullptr;
}

void IExecutionContext::setDeviceMemoryV2(void* memory_in, std::int64_t size) noexcept {
  memory = memory_in;
  memory_size = size;
}

bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
  if (played().no_step) return false;
  if (stream->capture != nullptr) ++played().captured_steps;
  submit(stream, [this, as_bound = bound] {
    // A graph is good as long as its context stays as it was.
    if (bound == as_bound) step(addresses, shapes);
  });
  return true;
}

ICudaEngine::ICudaEngine() {
  ++played().objects;
}

ICudaEngine::~ICudaEngine() {
  --played().objects;
}

Dims ICudaEngine::getProfileShape(const char* name, std::int32_t,
                                  OptProfileSelector selector) const noexcept {
  const std::string tensor = name;
  const bool most = selector == OptProfileSelector::kMAX;
  if (tensor == "head_map") return dims({2, most ? 5 : 1, 4});
  if (tensor == "input_ids") return dims({most ? 5 : 1, most ? 16 : 1});
  if (tensor == "page_table") return dims({most ? 5 : 1, most ? 8 : 1});
  Dims pool = getTensorShape(name);
  if (pool.nbDims != 4) return dims({});
  pool.d[0] = most ? 40 : 1;
  if (pool.d[1] < 0) pool.d[1] = most ? 2 : 1;
  pool.d[2] = 4;
  return pool;
}

std::int32_t ICudaEngine::getNbIOTensors() const noexcept {
  return static_cast<std::int32_t>(tensors.size());
}

const char* ICudaEngine::getIOTensorName(std::int32_t index) const noexcept {
  return tensors[static_cast<std::size_t>(index)].name;
}

Dims ICudaEngine::getTensorShape(const char* name) const noexcept {
  const std::string tensor = name;
  for (const Tensor& known : tensors) {
    if (tensor != known.name) continue;
    if (known.columns > 0) return dims({-1, known.heads, -1, known.columns});
  }
  return tensor == "logits" ? dims({-1, -1, kVocab}) : dims({-1});
}

DataType ICudaEngine::getTensorDataType(const char* name) const noexcept {
  const std::string tensor = name;
  return tensor.rfind("past_key.", 0) == 0 ? DataType::kINT8 : DataType::kHALF;
}

std::int64_t ICudaEngine::getDeviceMemorySizeForProfileV2(std::int32_t profile) const noexcept {
  return profile == 0 ? 3000 : 500;
}

IExecutionContext* ICudaEngine::createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept {
  if (played().contexts_before_fault-- == 0) return nullptr;
  return new IExecutionContext(strategy);
}

IPluginCreatorInterface* IPluginRegistry::getCreator(const char* name, const char* version,
                                                     const char* space) noexcept {
  static IPluginCreatorInterface creator;
  const bool ours = std::string(name) + version + space == "ClusteredHeadAttention2chai";
  return ours && played().plugin_is_registered ? &creator : nullptr;
}

IPluginRegistry::PluginLibraryHandle IPluginRegistry::loadLibrary(const char* path) noexcept {
  static int handle = 0;
  if (played().no_library || played().plugin_is_registered) return nullptr;
  played().loaded_libraries.emplace_back(path);
  played().plugin_is_registered = true;
  return &handle;
}

IRuntime::IRuntime() {
  ++played().objects;
}

IRuntime::~IRuntime() {
  --played().objects;
}

IPluginRegistry& IRuntime::getPluginRegistry() noexcept {
  static IPluginRegistry registry;
  return registry;
}

ICudaEngine* IRuntime::deserializeCudaEngine(const void*, std::size_t) noexcept {
  return played().no_engine ? nullptr : new ICudaEngine;
}

IRuntime* createInferRuntime(ILogger&) noexcept {
  return new IRuntime;
}

}  // namespace nvinfer1
