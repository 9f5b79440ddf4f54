#include "op/onnxruntime/cuda_kernel.h"

#include <array>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <utility>

namespace chai::ort {
namespace {

namespace own = schema::clustered_head_attention;
using cuda::Symbol;
using cuda::Symbols;
using Name = cuda::Tensor;

constexpr std::size_t kNumInputs = std::size(own::kInputs);

// What kernels call an input; pools go by the outputs' addresses.
constexpr std::array<Name, kNumInputs> kNameOf = {
    Name::kQuery,     Name::kKey,         Name::kValue,      Name::kKeyCache,    Name::kValueCache,
    Name::kKeyScales, Name::kValueScales, Name::kPageTable,  Name::kPastHeadMap, Name::kPastLengths,
    Name::kLengths,   Name::kSinks,       Name::kAlibiSlopes};

struct PoolOf {
  std::size_t input, output;
};
constexpr std::array<PoolOf, 4> kPools = {{{own::kKeyCache, own::kPresentKeyCache},
                                           {own::kValueCache, own::kPresentValueCache},
                                           {own::kKeyScales, own::kPresentKeyScales},
                                           {own::kValueScales, own::kPresentValueScales}}};

const char* dtype_of(Storage storage) {
  if (storage == Storage::kFloat16) return "float16";
  return storage == Storage::kBfloat16 ? "bfloat16" : "float32";
}

std::size_t item_bytes(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return 2;
    default:
      return 1;
  }
}

std::size_t bytes_of(const Tensor& tensor) {
  std::size_t bytes = item_bytes(tensor.type);
  for (std::int64_t dim : tensor.dims) bytes *= static_cast<std::size_t>(dim);
  return bytes;
}

// Scratch memory of one call.
class Scratch {
 public:
  Scratch(cuda::KernelSource& source, std::size_t bytes, cuda::Stream stream)
      : source_(source), stream_(stream), memory_(bytes == 0 ? nullptr : source.take(bytes, stream)) {}
  ~Scratch() {
    if (memory_ != nullptr) source_.give(memory_, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  cuda::KernelSource& source_;
  cuda::Stream stream_;
  void* memory_;
};

[[noreturn]] void refuse_node(const std::string& reason) {
  refuse(own::kOpType, reason);
}

}  // namespace

struct CudaKernel::Inputs {
  std::array<Tensor, kNumInputs> tensors;

  explicit Inputs(const OrtKernelContext* context) {
    for (std::size_t i = 0; i < kNumInputs; ++i) {
      tensors[i] = input(context, own::kOpType, own::kInputs[i], i);
    }
  }
  const Tensor& operator[](std::size_t index) const { return tensors[index]; }
};

CudaKernel::CudaKernel(const OrtKernelInfo* info, Storage storage, Storage keys, Storage values,
                       cuda::KernelSource& source)
    : storage_(storage),
      keys_(keys),
      values_(values),
      attributes_(read_attributes(info, own::kOpType, storage, keys, values)),
      source_(source) {
  if (attributes_.group < 1) refuse_node("group is " + std::to_string(attributes_.group));
}

Symbols CudaKernel::checked_sizes(const Inputs& in) const {
  const Tensor& query = in[own::kQuery];
  const Tensor& pool = in[own::kKeyCache];
  Symbols sizes;
  const std::int64_t b = sizes[Symbol::kB] = query.dims[0];
  const std::int64_t h = sizes[Symbol::kH] = query.dims[1];
  const std::int64_t s = sizes[Symbol::kS] = query.dims[2];
  const std::int64_t d = sizes[Symbol::kD] = query.dims[3];
  const std::int64_t g = sizes[Symbol::kG] = in[own::kKey].dims[1];
  const std::int64_t dv = sizes[Symbol::kDv] = in[own::kValue].dims[3];
  const std::int64_t n = sizes[Symbol::kN] = pool.dims[0];
  const std::int64_t r = sizes[Symbol::kR] = pool.dims[1];
  const std::int64_t l = sizes[Symbol::kL] = pool.dims[2];
  const std::int64_t m = in[own::kPageTable].dims[1];
  sizes[Symbol::kC] = m * l;
  sizes[Symbol::kP] = attributes_.probe_tokens;
  sizes[Symbol::kOnline] = attributes_.online;
  sizes[Symbol::kWindow] = attributes_.window;
  if (b < 1 || s < 1 || n < 1 || m * l < 1) {
    refuse_node("query " + text(query.dims) + ", key_cache " + text(pool.dims) + " or page_table " +
                text(in[own::kPageTable].dims) + " is empty");
  }
  if (r < 1 || r > g) {
    refuse_node("key_cache keeps " + std::to_string(r) + " heads, allowed are 1 to " + std::to_string(g));
  }
  const std::int64_t group = attributes_.group;
  const auto expect = [&](std::size_t index, const Dims& dims) {
    if (in[index] && in[index].dims != dims) {
      refuse_node(std::string(own::kInputs[index].name) + " is " + text(in[index].dims) + ", expected " +
                  text(dims));
    }
  };
  const auto expect_scales = [&](std::size_t index, Storage storage, std::int64_t heads, std::int64_t dim) {
    if (static_cast<bool>(in[index]) != quantised(storage)) {
      refuse_node(std::string(own::kInputs[index].name) +
                  (in[index] ? " is given for a cache without scales" : " is missing"));
    }
    expect(index, {n, heads, l, row_scales(storage, dim, group)});
  };
  expect(own::kKey, {b, g, s, d});
  expect(own::kValue, {b, g, s, dv});
  expect(own::kKeyCache, {n, r, l, keys_ == Storage::kInt4 ? d / 2 : d});
  expect(own::kValueCache, {n, g, l, values_ == Storage::kInt4 ? dv / 2 : dv});
  expect_scales(own::kKeyScales, keys_, r, d);
  expect_scales(own::kValueScales, values_, g, dv);
  expect(own::kPageTable, {b, m});
  expect(own::kPastHeadMap, {b, h});
  expect(own::kPastLengths, {b});
  expect(own::kLengths, {b});
  expect(own::kSinks, {h});
  expect(own::kAlibiSlopes, {h});
  return sizes;
}

const cuda::LoadedKernels& CudaKernel::kernels_for(const Symbols& sizes, const Inputs& in) const {
  const bool has_groups = quantised(keys_) || quantised(values_);
  for (const cuda::LoadedKernels& kernels : source_.here()) {
    const cuda::KernelSpec& spec = kernels.program.spec();
    if (spec.dtype == dtype_of(storage_) && spec.heads == sizes[Symbol::kH] &&
        spec.kv_heads == sizes[Symbol::kG] && spec.head_dim == sizes[Symbol::kD] &&
        spec.value_dim == sizes[Symbol::kDv] && spec.probe_tokens == attributes_.probe_tokens &&
        spec.key_bits == attributes_.key_bits && spec.value_bits == attributes_.value_bits &&
        (!has_groups || spec.group == attributes_.group) && spec.softcap == (attributes_.softcap > 0.0f) &&
        spec.sinks == static_cast<bool>(in[own::kSinks]) &&
        spec.slopes == static_cast<bool>(in[own::kAlibiSlopes])) {
      return kernels;
    }
  }
  refuse_node("no kernels in " + source_.directory() + " were compiled for this node (" + dtype_of(storage_) +
              ", " + std::to_string(sizes[Symbol::kH]) + " query heads, keys in " +
              std::to_string(attributes_.key_bits) + " and values in " +
              std::to_string(attributes_.value_bits) +
              " bits); run `chai-export build --backend onnxruntime --gpu` again");
}

std::shared_ptr<const cuda::Plan> CudaKernel::plan_for(const cuda::LoadedKernels& kernels,
                                                       const Symbols& sizes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (plan_ == nullptr || planned_kernels_ != &kernels || planned_sizes_ != sizes) {
    plan_ = std::make_shared<const cuda::Plan>(kernels.program.plan(sizes));
    planned_kernels_ = &kernels;
    planned_sizes_ = sizes;
  }
  return plan_;
}

void CudaKernel::compute(OrtKernelContext* context) const {
  const Inputs in(context);
  const Symbols sizes = checked_sizes(in);
  const cuda::LoadedKernels& kernels = kernels_for(sizes, in);
  const std::shared_ptr<const cuda::Plan> plan = plan_for(kernels, sizes);
  const cuda::Stream to = stream(context);

  cuda::Tensors tensors{};
  const auto at = [&](Name name) -> void*& { return tensors[static_cast<std::size_t>(name)]; };
  // Kernel arguments are not const; kernels only read what the op calls an input.
  for (std::size_t i = 0; i < kNumInputs; ++i) at(kNameOf[i]) = const_cast<void*>(in[i].data);
  for (const PoolOf& pool : kPools) {
    if (in[pool.input]) {
      at(kNameOf[pool.input]) = output(context, own::kOpType, pool.output, in[pool.input].dims);
    }
  }
  const std::int64_t b = sizes[Symbol::kB];
  const std::int64_t width = sizes[Symbol::kH] * sizes[Symbol::kDv];
  at(Name::kOutput) = output(context, own::kOpType, own::kOutput, {b, sizes[Symbol::kS], width});
  at(Name::kPresentHeadMap) = output(context, own::kOpType, own::kPresentHeadMap, {b, sizes[Symbol::kH]});
  if (at(Name::kPresentHeadMap) == at(Name::kPastHeadMap))
    refuse_node("past_head_map and present_head_map have one address; only the caches may be shared");
  const std::size_t alignment = kernels.program.pointer_alignment();
  const auto require_aligned = [&](const char* name, const void* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % alignment != 0) {
      refuse_node(std::string(name) + " does not start at a multiple of " + std::to_string(alignment) +
                  " bytes; bind memory that does");
    }
  };
  for (std::size_t i : {own::kQuery, own::kKey, own::kValue, own::kKeyCache, own::kValueCache,
                        own::kKeyScales, own::kValueScales}) {
    require_aligned(own::kInputs[i].name, at(kNameOf[i]));
  }
  require_aligned("output", at(Name::kOutput));

  for (const PoolOf& pool : kPools) {
    void* const present = at(kNameOf[pool.input]);
    if (present != in[pool.input].data)
      kernels.launcher->copy(present, in[pool.input].data, bytes_of(in[pool.input]), to);
  }
  const Scratch scratch(source_, kernels.program.workspace_bytes(sizes), to);
  const float scale =
      attributes_.scale != 0.0f ? attributes_.scale : 1.0f / std::sqrt(static_cast<float>(sizes[Symbol::kD]));
  cuda::run(*plan, tensors, scratch.get(), {scale, attributes_.softcap}, *kernels.launcher, to);
}

}  // namespace chai::ort
