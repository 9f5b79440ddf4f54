// The op for ONNX Runtime's CUDA provider without a GPU: how it is registered, what it refuses, what it
// launches. Both ONNX Runtime and CUDA are played; addresses are those of host memory that nothing reads.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "op/cuda/kernel_image.h"
#include "op/onnxruntime/cuda_kernel.h"
#include "tests/op/cuda/fixtures.h"
#include "tests/op/onnxruntime/played_runtime.h"
#include "tests/played/played.h"

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

namespace chai::ort::test {
namespace {

namespace fs = std::filesystem;
namespace own = schema::clustered_head_attention;
using chai::test::play_afresh;
using chai::test::played;
using cuda::test::kArgumentCounts;
using cuda::test::KernelDirectory;
using cuda::test::kIndex;
using cuda::test::RecordingLauncher;

constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr auto kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;

// Kernels for sm_90 of one form, as `build --gpu` lays them out.
class Kernels {
 public:
  explicit Kernels(const std::string& target = "sm_90") {
    char name[] = "/tmp/chai-library-XXXXXX";
    REQUIRE(mkdtemp(name) != nullptr);
    path_ = name;
    const KernelDirectory made;
    fs::create_directory(fs::path(path_) / target);
    fs::copy(made.path(), fs::path(path_) / target / "k8v4");
  }
  ~Kernels() { fs::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Remembers launches, copies and scratch memory in the order of a stream.
class Recorder final : public cuda::KernelSource {
 public:
  explicit Recorder(const std::string& index = kIndex) {
    const KernelDirectory directory(index);
    const auto image = cuda::KernelImage::from_directory(directory.path());
    launcher = std::make_shared<RecordingLauncher>(kArgumentCounts);
    kernels_.push_back({cuda::Program::parse(image->file(cuda::kIndexFile)), launcher});
  }
  const std::vector<cuda::LoadedKernels>& here() override { return kernels_; }
  void* take(std::size_t bytes, cuda::Stream stream) override {
    taken_bytes.push_back(bytes);
    streams.push_back(stream);
    return scratch;
  }
  void give(void* memory, cuda::Stream) noexcept override { given += memory == scratch; }
  const std::string& directory() const override { return name_; }

  std::shared_ptr<RecordingLauncher> launcher;
  std::vector<std::size_t> taken_bytes;
  std::vector<cuda::Stream> streams;
  int given = 0;
  alignas(256) char scratch[8] = {};

 private:
  std::vector<cuda::LoadedKernels> kernels_;
  std::string name_ = "kernels/";
};

// A call of the form that the kernels are for: two rows, three pages of 32 positions each, a pool of eight,
// one of two heads kept, no slopes. Caches are in place.
struct Call {
  explicit Call(std::int64_t tokens) {
    info.floats = {{"scale", 0.25f}};
    info.integers = {{"probe_tokens", 5}, {"key_bits", 8}, {"value_bits", 4}, {"group", 8}, {"window", 40}};
    const std::vector<std::pair<ONNXTensorElementDataType, std::vector<std::int64_t>>> shapes = {
        {kHalf, {2, 4, tokens, 16}},
        {kHalf, {2, 2, tokens, 16}},
        {kHalf, {2, 2, tokens, 8}},
        {kInt8, {8, 1, 32, 16}},
        {kUint8, {8, 2, 32, 4}},
        {kHalf, {8, 1, 32, 2}},
        {kHalf, {8, 2, 32, 2}},
        {kInt32, {2, 3}},
        {kInt32, {2, 4}},
        {kInt32, {2}},
        {kInt32, {2}},
        {kHalf, {4}},
        {kHalf, {0}}};
    for (const auto& [type, dims] : shapes) context.inputs.push_back({next(), dims, type});
    context.inputs[own::kAlibiSlopes].data = nullptr;
    for (std::size_t like : {own::kQuery, own::kKeyCache, own::kValueCache, own::kKeyScales,
                             own::kValueScales, own::kPastHeadMap}) {
      context.outputs.push_back(context.inputs[like]);
    }
    context.outputs[own::kOutput].data = next();
    context.outputs[own::kPresentHeadMap].data = next();
    context.stream = &context;
  }
  void* next() { return memory + 256 * ++used; }
  std::uint64_t address(std::size_t input) const {
    return reinterpret_cast<std::uint64_t>(context.inputs[input].data);
  }

  alignas(256) char memory[256 * 20] = {};
  int used = 0;
  OrtKernelInfo info;
  OrtKernelContext context;
};

std::string run(Call& call, cuda::KernelSource& source) {
  api = played_runtime()->GetApi(kApiVersion);
  return taken(guarded([&] {
    const CudaKernel kernel(&call.info, Storage::kFloat16, Storage::kInt8, Storage::kInt4, source);
    kernel.compute(&call.context);
  }));
}

std::vector<const OrtCustomOp*> registered(const std::string& kernels, const char* provider) {
  OrtSessionOptions options;
  if (!kernels.empty()) options.entries["chai.gpu_kernels"] = kernels;
  CHECK(taken(RegisterCustomOps(&options, played_runtime())) == "");
  std::vector<const OrtCustomOp*> found;
  for (const OrtCustomOp* op : options.ops) {
    if (std::string(op->GetExecutionProviderType(op)) == provider) found.push_back(op);
  }
  return found;
}

TEST_CASE("the CUDA provider's ops are there for sessions that name kernels, and for no others") {
  const Kernels kernels;
  CHECK(registered("", "CUDAExecutionProvider").empty());
  const std::size_t on_cpu = registered("", "CPUExecutionProvider").size();
  CHECK(registered(kernels.path(), "CPUExecutionProvider").size() == on_cpu);
  const auto on_gpu = registered(kernels.path(), "CUDAExecutionProvider");
  CHECK(2 * on_gpu.size() == on_cpu);  // the shared op has no kernels
  for (const OrtCustomOp* op : on_gpu) {
    CHECK(std::string(op->GetName(op)) == own::kOpType);
    CHECK(op->GetInputTypeCount(op) == 13);
    CHECK(op->GetOutputTypeCount(op) == 6);
    CHECK(op->GetInputMemoryType(op, own::kLengths) == OrtMemTypeDefault);  // read on the GPU
  }
  CHECK(registered(kernels.path(), "CUDAExecutionProvider") == on_gpu);
}

TEST_CASE("a registered op loads the kernels of the GPU at its first call, and launches them") {
  play_afresh();
  const Kernels kernels;
  const auto ops = registered(kernels.path(), "CUDAExecutionProvider");
  const auto fits = [](const OrtCustomOp* op) {
    return op->GetInputType(op, own::kQuery) == kHalf && op->GetInputType(op, own::kKeyCache) == kInt8 &&
           op->GetInputType(op, own::kValueCache) == kUint8;
  };
  REQUIRE(std::count_if(ops.begin(), ops.end(), fits) == 1);
  const OrtCustomOp* op = *std::find_if(ops.begin(), ops.end(), fits);
  Call call(7);
  void* kernel = nullptr;
  REQUIRE(taken(op->CreateKernelV2(op, nullptr, &call.info, &kernel)) == "");
  CHECK(played().code.empty());
  CHECK(taken(op->KernelComputeV2(kernel, &call.context)) == "");
  CHECK(taken(op->KernelComputeV2(kernel, &call.context)) == "");
  op->KernelDestroy(kernel);
  CHECK(played().code.size() == 2);  // once
  REQUIRE(played().launches.size() == 2);
  CHECK(played().launches[0].kernel == "several");
  CHECK(played().launches[0].grid[0] == 2);
  CHECK(played().pool_bytes == 0);  // all scratch memory was given back
  CHECK(played().most_pool_bytes > 0);
}

TEST_CASE("a GPU without kernels is told what to build") {
  play_afresh();
  const Kernels kernels("sm_80");
  cuda::KernelLibrary library(kernels.path());
  Call call(1);
  const std::string problem = run(call, library);
  CHECK(problem.find("this GPU is sm_90 and " + kernels.path() +
                     " has kernels for sm_80; run `chai-export "
                     "build --backend onnxruntime --gpu sm_90`") != std::string::npos);
  CHECK(played().libraries == 0);
  cuda::KernelLibrary nowhere("/nowhere");
  CHECK(run(call, nowhere).find("has kernels for none") != std::string::npos);
}

TEST_CASE("kernels get the tensors of the call, the pools in place") {
  Recorder recorder;
  Call call(7);
  CHECK(run(call, recorder) == "");
  REQUIRE(recorder.launcher->launches.size() == 1);
  const auto& launch = recorder.launcher->launches[0];
  CHECK(launch.size.grid == std::array<std::uint32_t, 3>{2, 4, 2});
  float scale = 0.0f;
  std::memcpy(&scale, &launch.arguments[3], sizeof(scale));
  CHECK(launch.arguments[0] == call.address(own::kQuery));
  CHECK(launch.arguments[1] == reinterpret_cast<std::uint64_t>(recorder.scratch) + 256);
  CHECK(static_cast<std::uint32_t>(launch.arguments[2]) == 96);
  CHECK(scale == 0.25f);
  CHECK(launch.arguments[4] == call.address(own::kKeyCache));
  CHECK(recorder.launcher->copies.empty());
  CHECK(recorder.taken_bytes == std::vector<std::size_t>{256 + 512});
  CHECK(recorder.streams == std::vector<cuda::Stream>{reinterpret_cast<cuda::Stream>(&call.context)});
  CHECK(recorder.given == 1);
}

TEST_CASE("pools that are not in place are copied first, each whole") {
  Recorder recorder;
  Call call(1);
  for (std::size_t output : {own::kPresentKeyCache, own::kPresentValueScales})
    call.context.outputs[output].data = call.next();
  CHECK(run(call, recorder) == "");
  REQUIRE(recorder.launcher->copies.size() == 2);
  CHECK(recorder.launcher->copies[0].target == call.context.outputs[own::kPresentKeyCache].data);
  CHECK(recorder.launcher->copies[0].source == call.context.inputs[own::kKeyCache].data);
  CHECK(recorder.launcher->copies[0].bytes == 8 * 32 * 16);
  CHECK(recorder.launcher->copies[1].bytes == 8 * 2 * 32 * 2 * 2);
}

TEST_CASE("what kernels refuse gives the scratch memory back") {
  Recorder recorder;
  recorder.launcher->refuses = true;
  Call call(1);
  CHECK(run(call, recorder) == "the recorder refuses");
  CHECK(recorder.given == 1);
}

TEST_CASE("calls that kernels must not see are refused by name") {
  struct Fault {
    std::function<void(Call&)> make;
    std::string message;
  };
  const std::vector<Fault> faults = {
      {[](Call& c) { c.context.inputs[own::kKey].dims[2] = 3; },
       "key is [2, 2, 3, 16], expected [2, 2, 7, 16]"},
      {[](Call& c) { c.context.inputs[own::kValueCache].dims[3] = 8; }, "value_cache is [8, 2, 32, 8]"},
      {[](Call& c) { c.context.inputs[own::kKeyScales].dims[3] = 4; }, "key_scales is [8, 1, 32, 4]"},
      {[](Call& c) { c.context.inputs[own::kKeyScales].data = nullptr; }, "key_scales is missing"},
      {[](Call& c) { c.context.inputs[own::kKeyCache].dims[1] = 3; },
       "key_cache keeps 3 heads, allowed are 1 to 2"},
      {[](Call& c) { c.context.inputs[own::kPageTable].dims[1] = 0; }, "is empty"},
      {[](Call& c) { c.context.inputs[own::kLengths].dims[0] = 3; }, "lengths is [3], expected [2]"},
      {[](Call& c) { c.context.inputs[own::kQuery].dims.pop_back(); }, "query has rank 3, expected 4"},
      {[](Call& c) { c.info.integers["key_bits"] = 4; }, "key_bits is 4, which is not what the type"},
      {[](Call& c) { c.info.integers["group"] = 0; }, "group is 0"},
      {[](Call& c) {
         c.context.outputs[own::kPresentHeadMap].data = c.context.inputs[own::kPastHeadMap].data;
       },
       "past_head_map and present_head_map have one address"},
      {[](Call& c) { c.context.outputs[own::kOutput].data = static_cast<char*>(c.next()) + 2; },
       "output does not start at a multiple of 16 bytes"},
      {[](Call& c) { c.info.integers["probe_tokens"] = 6; },
       "no kernels in kernels/ were compiled for this node"},
      {[](Call& c) { c.info.floats["softcap"] = 2.0f; },
       "no kernels in kernels/ were compiled for this node"},
      {[](Call& c) { c.context.inputs[own::kSinks].data = nullptr; }, "float16, 4 query heads, keys in 8"},
  };
  for (const Fault& fault : faults) {
    Recorder recorder;
    Call call(7);
    fault.make(call);
    const std::string problem = run(call, recorder);
    INFO(problem);
    CHECK(problem.find(fault.message) != std::string::npos);
    CHECK(problem.rfind("chai::ClusteredHeadAttention: ", 0) == 0);
    CHECK(recorder.launcher->launches.empty());
    CHECK(recorder.launcher->copies.empty());
  }
}

TEST_CASE("without an attribute scale is 1 / sqrt(D)") {
  Recorder recorder;
  Call call(7);
  call.info.floats.clear();
  CHECK(run(call, recorder) == "");
  float scale = 0.0f;
  std::memcpy(&scale, &recorder.launcher->launches.at(0).arguments[3], sizeof(scale));
  CHECK(scale == 1.0f / std::sqrt(16.0f));
}

}  // namespace
}  // namespace chai::ort::test
