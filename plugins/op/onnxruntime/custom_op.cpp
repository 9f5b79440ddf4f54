// The ops of domain chai as custom ops of ONNX Runtime's CPU provider, through the C API alone.
//
// chai::ClusteredHeadAttention
//
//   input   0 query            T [B,H,S,D]      output  0 output            T [B,S,H*Dv]
//           1 key              T [B,G,S,D]              1 present_key       T [B,R,C,D]
//           2 value            T [B,G,S,Dv]             2 present_value     T [B,G,C,Dv]
//           3 past_key         T [B,R,C,D]              3 present_head_map  int32 [B,H]
//           4 past_value       T [B,G,C,Dv]
//           5 past_head_map    int32 [B,H]      attributes: scale, probe_tokens, online
//           6 past_lengths     int32 [B]
//           7 lengths          int32 [B]        T: float32, float16 or bfloat16, one op for each
//
// chai::SharedClusteredHeadAttention, which reads the caches that another node gives
//
//   input   0 query            T [B,H,S,D]      output  0 output            T [B,S,H*Dv]
//           1 key              T [B,G,S,D]              1 present_head_map  int32 [B,H]
//           2 key_cache        T [B,R,C,D]
//           3 value_cache      T [B,G,C,Dv]     attributes as above
//           4 kept_head_map    int32 [B,H]
//           5 past_head_map    int32 [B,H]
//           6 past_lengths     int32 [B]
//           7 lengths          int32 [B]
//
// Caches are updated in place when past and present are one buffer. Every error is an OrtStatus, and nothing
// has been written when one is returned.
#include <onnxruntime_c_api.h>

#include <array>
#include <cstdint>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "chai/attention.h"

namespace {

// The oldest C API with everything used here, so that the library runs in any later ONNX Runtime, whatever
// headers it was compiled with.
constexpr std::uint32_t kApiVersion = 18;

constexpr char kDomain[] = "chai";
constexpr std::size_t kInputs = 8;

struct Input {
  const char* name;
  std::size_t rank;
  bool integer;
};

// What tells the two ops apart to ONNX Runtime. Their outputs are tensors of type T and then one head map.
struct Signature {
  const char* op;
  Input inputs[kInputs];
  std::size_t outputs;
};

constexpr Signature kOwn = {"ClusteredHeadAttention",
                            {{"query", 4, false},
                             {"key", 4, false},
                             {"value", 4, false},
                             {"past_key", 4, false},
                             {"past_value", 4, false},
                             {"past_head_map", 2, true},
                             {"past_lengths", 1, true},
                             {"lengths", 1, true}},
                            4};
constexpr Signature kShared = {"SharedClusteredHeadAttention",
                               {{"query", 4, false},
                                {"key", 4, false},
                                {"key_cache", 4, false},
                                {"value_cache", 4, false},
                                {"kept_head_map", 2, true},
                                {"past_head_map", 2, true},
                                {"past_lengths", 1, true},
                                {"lengths", 1, true}},
                               2};

// Positions of the inputs that both ops have.
constexpr std::size_t kQuery = 0, kKey = 1, kPastHeadMap = 5, kPastLengths = 6, kLengths = 7;

const OrtApi* api = nullptr;

// A status of ONNX Runtime on its way to the runtime.
struct Failure {
  OrtStatus* status;
};

void require(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

[[noreturn]] void refuse(const Signature& signature, const std::string& reason) {
  const std::string message = std::string("chai::") + signature.op + ": " + reason;
  throw Failure{api->CreateStatus(ORT_INVALID_ARGUMENT, message.c_str())};
}

// Every callback that may fail goes through here: no exception crosses the C boundary.
template <typename Body>
OrtStatus* guarded(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api->CreateStatus(ORT_FAIL, "unknown error");
  }
}

struct Tensor {
  const void* data = nullptr;
  std::vector<std::int64_t> dims;
};

Tensor input(const OrtKernelContext* context, const Signature& signature, std::size_t index) {
  const Input& expected = signature.inputs[index];
  const OrtValue* value = nullptr;
  require(api->KernelContext_GetInput(context, index, &value));
  if (value == nullptr) refuse(signature, std::string(expected.name) + " is missing");
  OrtTensorTypeAndShapeInfo* info = nullptr;
  require(api->GetTensorTypeAndShape(value, &info));
  Tensor tensor;
  std::size_t rank = 0;
  OrtStatus* status = api->GetDimensionsCount(info, &rank);
  if (status == nullptr) {
    tensor.dims.resize(rank);
    status = api->GetDimensions(info, tensor.dims.data(), rank);
  }
  api->ReleaseTensorTypeAndShapeInfo(info);
  require(status);
  if (rank != expected.rank) {
    refuse(signature, std::string(expected.name) + " has rank " + std::to_string(rank) + ", expected " +
                          std::to_string(expected.rank));
  }
  void* data = nullptr;
  require(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

void* output(OrtKernelContext* context, const Signature& signature, std::size_t index,
             const std::vector<std::int64_t>& dims) {
  OrtValue* value = nullptr;
  require(api->KernelContext_GetOutput(context, index, dims.data(), dims.size(), &value));
  if (value == nullptr) refuse(signature, "output " + std::to_string(index) + " must be present");
  void* data = nullptr;
  require(api->GetTensorMutableData(value, &data));
  return data;
}

std::string text(const std::vector<std::int64_t>& dims) {
  std::string result = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) result += (i ? ", " : "") + std::to_string(dims[i]);
  return result + "]";
}

using Inputs = std::array<Tensor, kInputs>;

chai::AttentionShape shape_of(const Signature& signature, const Inputs& inputs) {
  const bool shared = &signature == &kShared;
  const Tensor& key_cache = inputs[shared ? 2 : 3];
  const Tensor& value_cache = inputs[shared ? 3 : 4];
  chai::AttentionShape shape;
  shape.batch = inputs[kQuery].dims[0];
  shape.heads = inputs[kQuery].dims[1];
  shape.tokens = inputs[kQuery].dims[2];
  shape.key_dim = inputs[kQuery].dims[3];
  shape.kv_heads = inputs[kKey].dims[1];
  shape.value_dim = (shared ? value_cache : inputs[2]).dims[3];
  shape.kept = key_cache.dims[1];
  shape.capacity = key_cache.dims[2];
  using Dims = std::vector<std::int64_t>;
  const Dims keys{shape.batch, shape.kept, shape.capacity, shape.key_dim};
  const Dims values{shape.batch, shape.kv_heads, shape.capacity, shape.value_dim};
  const Dims map{shape.batch, shape.heads};
  std::vector<Dims> expected = {{shape.batch, shape.heads, shape.tokens, shape.key_dim},
                                {shape.batch, shape.kv_heads, shape.tokens, shape.key_dim}};
  if (shared) {
    expected.insert(expected.end(), {keys, values, map, map});
  } else {
    expected.insert(expected.end(),
                    {{shape.batch, shape.kv_heads, shape.tokens, shape.value_dim}, keys, values, map});
  }
  expected.insert(expected.end(), {{shape.batch}, {shape.batch}});
  for (std::size_t i = 0; i < kInputs; ++i) {
    if (inputs[i].dims != expected[i]) {
      refuse(signature, std::string(signature.inputs[i].name) + " is " + text(inputs[i].dims) +
                            ", expected " + text(expected[i]));
    }
  }
  return shape;
}

void run_in_pool(void* context, std::size_t count, void (*task)(void*, std::size_t), void* data) {
  // Without a number of batches, threads take one task after the other.
  require(
      api->KernelContext_ParallelFor(static_cast<const OrtKernelContext*>(context), task, count, 0, data));
}

class Kernel {
 public:
  Kernel(const OrtKernelInfo* info, chai::Storage storage, const Signature& signature)
      : signature_(signature) {
    call_.storage = storage;
    float scale = 0.0f;
    std::int64_t probe_tokens = 5;
    std::int64_t online = 1;
    optional(api->KernelInfoGetAttribute_float(info, "scale", &scale));
    optional(api->KernelInfoGetAttribute_int64(info, "probe_tokens", &probe_tokens));
    optional(api->KernelInfoGetAttribute_int64(info, "online", &online));
    call_.scale = scale;
    call_.probe_tokens = probe_tokens;
    call_.online = online != 0;
    std::string error;
    if (!chai::choose_isa(&isa_, &error)) refuse(signature_, error);
  }

  void compute(OrtKernelContext* context) const {
    Inputs inputs;
    for (std::size_t i = 0; i < kInputs; ++i) inputs[i] = input(context, signature_, i);
    chai::AttentionCall call = call_;
    call.shape = shape_of(signature_, inputs);
    call.query = inputs[kQuery].data;
    call.key = inputs[kKey].data;
    call.past_head_map = integers(inputs[kPastHeadMap]);
    call.past_lengths = integers(inputs[kPastLengths]);
    call.lengths = integers(inputs[kLengths]);
    const bool shared = &signature_ == &kShared;
    if (shared) {
      call.present_key = const_cast<void*>(inputs[2].data);  // only read
      call.present_value = const_cast<void*>(inputs[3].data);
      call.kept_head_map = integers(inputs[4]);
    } else {
      call.value = inputs[2].data;
      call.past_key = inputs[3].data;
      call.past_value = inputs[4].data;
    }
    const std::string problem = chai::check(call);
    if (!problem.empty()) refuse(signature_, problem);

    const chai::AttentionShape& s = call.shape;
    call.output = output(context, signature_, 0, {s.batch, s.tokens, s.heads * s.value_dim});
    if (!shared) {
      call.present_key = output(context, signature_, 1, inputs[3].dims);
      call.present_value = output(context, signature_, 2, inputs[4].dims);
    }
    call.present_head_map = static_cast<std::int32_t*>(
        output(context, signature_, signature_.outputs - 1, inputs[kPastHeadMap].dims));

    chai::Executor executor;
    executor.context = context;
    executor.run = run_in_pool;
    executor.threads = threads_;
    chai::attend(call, isa_, executor);
  }

 private:
  // An attribute that a node leaves out keeps its default.
  static void optional(OrtStatus* status) {
    if (status != nullptr) api->ReleaseStatus(status);
  }

  static const std::int32_t* integers(const Tensor& tensor) {
    return static_cast<const std::int32_t*>(tensor.data);
  }

  const Signature& signature_;
  chai::AttentionCall call_;
  chai::Isa isa_ = chai::Isa::kPortable;
  // The pool does not tell its size. Asked for once: the C library reads a file for it each time.
  std::size_t threads_ = std::thread::hardware_concurrency();
};

// One op per storage type under each name: ONNX Runtime picks by the type of the inputs.
struct Op : OrtCustomOp {
  ONNXTensorElementDataType type;
  chai::Storage storage;
  const Signature& signature;

  Op(const Signature& signature_in, ONNXTensorElementDataType type_in, chai::Storage storage_in)
      : OrtCustomOp{}, type(type_in), storage(storage_in), signature(signature_in) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp* op) { return self(op).signature.op; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).signature.outputs; };
    GetInputType = [](const OrtCustomOp* op, std::size_t index) {
      return self(op).signature.inputs[index].integer ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : self(op).type;
    };
    GetOutputType = [](const OrtCustomOp* op, std::size_t index) {
      return index + 1 < self(op).signature.outputs ? self(op).type : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return guarded([&] { *kernel = new Kernel(info, self(op).storage, self(op).signature); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  api = base->GetApi(kApiVersion);
  if (api == nullptr)
    return nullptr;  // older than any runtime this package installs with; nothing can be said
  return guarded([&] {
    // ONNX Runtime keeps pointers to the ops and their domain as long as any session lives.
    static const Op ops[] = {{kOwn, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, chai::Storage::kFloat32},
                             {kOwn, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, chai::Storage::kFloat16},
                             {kOwn, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, chai::Storage::kBfloat16},
                             {kShared, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, chai::Storage::kFloat32},
                             {kShared, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, chai::Storage::kFloat16},
                             {kShared, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, chai::Storage::kBfloat16}};
    static OrtCustomOpDomain* const domain = [] {
      OrtCustomOpDomain* created = nullptr;
      require(api->CreateCustomOpDomain(kDomain, &created));
      for (const Op& op : ops) require(api->CustomOpDomain_Add(created, &op));
      return created;
    }();
    require(api->AddCustomOpDomain(options, domain));
  });
}
