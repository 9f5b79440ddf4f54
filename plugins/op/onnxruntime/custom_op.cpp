// The ops of domain chai as custom ops of ONNX Runtime, through the C API alone. Their inputs, outputs and
// attributes are those of chai/op_schema.h.
//
// All are there for the CPU provider. Sessions with an entry chai.gpu_kernels in their configuration, a
// directory of kernels, have the op for the CUDA provider too.
//
// Caches are updated in place when past and present are one buffer. Every error is an OrtStatus, and nothing
// has been written when one is returned.
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "op/cuda/kernel_library.h"
#include "op/onnxruntime/op_kernel.h"
#ifdef CHAI_WITH_CUDA
#include "op/onnxruntime/cuda_kernel.h"
#endif

namespace chai::ort {
namespace {

ONNXTensorElementDataType element_type(Storage storage) {
  switch (storage) {
    case Storage::kFloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Storage::kBfloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case Storage::kInt8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    case Storage::kInt4:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

// One op for each combination of types under each name: ONNX Runtime picks by the types of the
// inputs. Those with a source of kernels are for the CUDA provider.
struct Op : OrtCustomOp {
  const Signature& signature;
  Storage storage, keys, values;
  cuda::KernelSource* source;

  Op(const Signature& signature_in, Storage storage_in, Storage keys_in, Storage values_in,
     cuda::KernelSource* source_in = nullptr)
      : OrtCustomOp{},
        signature(signature_in),
        storage(storage_in),
        keys(keys_in),
        values(values_in),
        source(source_in) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp* op) { return self(op).signature.op; };
    GetExecutionProviderType = [](const OrtCustomOp* op) {
      return self(op).source == nullptr ? "CPUExecutionProvider" : "CUDAExecutionProvider";
    };
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).signature.num_inputs; };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).signature.num_outputs; };
    GetInputType = [](const OrtCustomOp* op, std::size_t index) {
      return self(op).type(self(op).signature.inputs[index]);
    };
    GetOutputType = [](const OrtCustomOp* op, std::size_t index) {
      return self(op).type(self(op).signature.outputs[index]);
    };
    GetInputCharacteristic = [](const OrtCustomOp* op, std::size_t index) {
      return characteristic(self(op).signature.inputs[index]);
    };
    GetOutputCharacteristic = [](const OrtCustomOp* op, std::size_t index) {
      return characteristic(self(op).signature.outputs[index]);
    };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return static_cast<int>(schema::kVersion); };
    GetEndVersion = GetStartVersion;
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return guarded([&] { *kernel = self(op).make_kernel(info).release(); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  std::unique_ptr<Kernel> make_kernel(const OrtKernelInfo* info) const {
#ifdef CHAI_WITH_CUDA
    if (source != nullptr) return std::make_unique<CudaKernel>(info, storage, keys, values, *source);
#endif
    return std::make_unique<OpKernel>(info, storage, keys, values, signature);
  }

  static const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

  static OrtCustomOpInputOutputCharacteristic characteristic(const schema::Parameter& parameter) {
    return parameter.optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }

  ONNXTensorElementDataType type(const schema::Parameter& parameter) const {
    switch (parameter.type) {
      case schema::Type::M:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
      case schema::Type::K:
        return element_type(keys);
      case schema::Type::V:
        return element_type(values);
      case schema::Type::F:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
      case schema::Type::A:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      default:
        return element_type(storage);
    }
  }
};

// T as it is, float16, 8 and 4 bits.
std::vector<Storage> cache_storages(Storage storage) {
  if (storage == Storage::kFloat16) return {storage, Storage::kInt8, Storage::kInt4};
  return {storage, Storage::kFloat16, Storage::kInt8, Storage::kInt4};
}

constexpr Storage kElements[] = {Storage::kFloat32, Storage::kFloat16, Storage::kBfloat16};

std::vector<Op> make_ops(cuda::KernelSource* source) {
  std::vector<Op> ops;
  for (Storage storage : kElements) {
    for (Storage keys : cache_storages(storage)) {
      for (Storage values : cache_storages(storage)) {
        ops.emplace_back(kOwn, storage, keys, values);
        ops.emplace_back(kShared, storage, keys, values);
        if (source != nullptr) ops.emplace_back(kOwn, storage, keys, values, source);
      }
    }
  }
  return ops;
}

constexpr const char* kKernelsEntry = "chai.gpu_kernels";

// The directory of GPU kernels that a session's configuration names; empty if it names none.
std::string kernels_of(const OrtSessionOptions* options) {
  int given = 0;
  require(api->HasSessionConfigEntry(options, kKernelsEntry, &given));
  if (!given) return "";
  std::size_t size = 0;
  require(api->GetSessionConfigEntry(options, kKernelsEntry, nullptr, &size));
  std::string value(size, '\0');
  require(api->GetSessionConfigEntry(options, kKernelsEntry, value.data(), &size));
  value.resize(size == 0 ? 0 : size - 1);  // its end counts
  return value;
}

// The ops of sessions with one directory of kernels, or with none.
class Domain {
 public:
  explicit Domain(const std::string& kernels) : source_(make_source(kernels)), ops_(make_ops(source_.get())) {
    require(api->CreateCustomOpDomain(schema::kDomain, &domain_));
    for (const Op& op : ops_) require(api->CustomOpDomain_Add(domain_, &op));
  }
  OrtCustomOpDomain* get() const { return domain_; }

 private:
  static std::unique_ptr<cuda::KernelSource> make_source(const std::string& kernels) {
    if (kernels.empty()) return nullptr;
#ifdef CHAI_WITH_CUDA
    return std::make_unique<cuda::KernelLibrary>(kernels);
#else
    throw Failure{api->CreateStatus(ORT_NOT_IMPLEMENTED,
                                    "this library was compiled without a CUDA toolkit; set CUDAToolkit_ROOT "
                                    "and compile it again, or run on CPUs")};
#endif
  }

  std::unique_ptr<cuda::KernelSource> source_;
  std::vector<Op> ops_;
  OrtCustomOpDomain* domain_ = nullptr;
};

// ONNX Runtime keeps pointers to the ops and their domain as long as any session lives: they stay.
const Domain& domain_for(const std::string& kernels) {
  static std::mutex mutex;
  static auto& domains = *new std::map<std::string, std::unique_ptr<Domain>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Domain>& found = domains[kernels];
  if (found == nullptr) found = std::make_unique<Domain>(kernels);
  return *found;
}

}  // namespace
}  // namespace chai::ort

// For those who bind caches in place: with a library of another version than a graph's nodes ONNX Runtime
// runs the function body without a word.
extern "C" __attribute__((visibility("default"))) int chai_op_version() {
  return static_cast<int>(chai::schema::kVersion);
}

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace chai::ort;
  api = base->GetApi(kApiVersion);
  if (api == nullptr)
    return nullptr;  // older than any runtime this package installs with; nothing can be said
  return guarded([&] { require(api->AddCustomOpDomain(options, domain_for(kernels_of(options)).get())); });
}
