// The ops of domain chai as custom ops of ONNX Runtime's CPU provider, through the C API alone. Their inputs,
// outputs and attributes are those of chai/op_schema.h.
//
// Caches are updated in place when past and present are one buffer. Every error is an OrtStatus, and nothing
// has been written when one is returned.
#include <vector>

#include "op/onnxruntime/op_kernel.h"

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
// inputs.
struct Op : OrtCustomOp {
  const Signature& signature;
  Storage storage, keys, values;

  Op(const Signature& signature_in, Storage storage_in, Storage keys_in, Storage values_in)
      : OrtCustomOp{}, signature(signature_in), storage(storage_in), keys(keys_in), values(values_in) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp* op) { return self(op).signature.op; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
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
      return guarded([&] {
        const Op& of = self(op);
        *kernel = new OpKernel(info, of.storage, of.keys, of.values, of.signature);
      });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] { static_cast<const OpKernel*>(kernel)->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<OpKernel*>(kernel); };
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

std::vector<Op> make_ops() {
  std::vector<Op> ops;
  for (Storage storage : kElements) {
    for (const Signature* signature : {&kOwn, &kShared}) {
      for (Storage keys : cache_storages(storage)) {
        for (Storage values : cache_storages(storage)) ops.emplace_back(*signature, storage, keys, values);
      }
    }
  }
  return ops;
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
  return guarded([&] {
    // ONNX Runtime keeps pointers to the ops and their domain as long as any session lives.
    static const std::vector<Op> ops = make_ops();
    static OrtCustomOpDomain* const domain = [] {
      OrtCustomOpDomain* created = nullptr;
      require(api->CreateCustomOpDomain(chai::schema::kDomain, &created));
      for (const Op& op : ops) require(api->CustomOpDomain_Add(created, &op));
      return created;
    }();
    require(api->AddCustomOpDomain(options, domain));
  });
}
