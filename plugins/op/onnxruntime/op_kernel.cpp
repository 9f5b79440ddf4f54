#include "op/onnxruntime/op_kernel.h"

#include "op/onnxruntime/kernel_v1.h"
#include "op/onnxruntime/kernel_v2.h"

namespace chai::ort {
namespace {

template <std::size_t INPUTS, std::size_t OUTPUTS>
constexpr Signature make(const char* op, std::int64_t version, const schema::Parameter (&inputs)[INPUTS],
                         const schema::Parameter (&outputs)[OUTPUTS], bool shared) {
  return {op, version, inputs, INPUTS, outputs, OUTPUTS, shared};
}

namespace own1 = schema::clustered_head_attention_v1;
namespace own2 = schema::clustered_head_attention_v2;
namespace shared1 = schema::shared_clustered_head_attention_v1;
namespace shared2 = schema::shared_clustered_head_attention_v2;

}  // namespace

const Signature kOwnV1 = make(own1::kOpType, own1::kVersion, own1::kInputs, own1::kOutputs, false);
const Signature kSharedV1 =
    make(shared1::kOpType, shared1::kVersion, shared1::kInputs, shared1::kOutputs, true);
const Signature kOwnV2 = make(own2::kOpType, own2::kVersion, own2::kInputs, own2::kOutputs, false);
const Signature kSharedV2 =
    make(shared2::kOpType, shared2::kVersion, shared2::kInputs, shared2::kOutputs, true);

OpKernel::OpKernel(const OrtKernelInfo* info, Storage storage, const Signature& signature)
    : signature_(signature) {
  own1::Attributes attributes;
  read(info, "scale", &attributes.scale);
  read(info, "probe_tokens", &attributes.probe_tokens);
  read(info, "online", &attributes.online);
  call_.storage = storage;
  call_.scale = attributes.scale;
  call_.probe_tokens = attributes.probe_tokens;
  call_.online = attributes.online != 0;
  std::string error;
  if (!choose_isa(&isa_, &error)) refuse(signature_.op, error);
}

void OpKernel::expect(std::size_t index, const Tensor& tensor, const Dims& dims) const {
  if (tensor && tensor.dims != dims) {
    refuse(signature_.op, std::string(signature_.inputs[index].name) + " is " + text(tensor.dims) +
                              ", expected " + text(dims));
  }
}

void OpKernel::check_call(const AttentionCall& call) const {
  const std::string problem = check(call);
  if (!problem.empty()) refuse(signature_.op, problem);
}

void OpKernel::evaluate(OrtKernelContext* context, AttentionCall* call, std::size_t map_output) const {
  const AttentionShape& s = call->shape;
  call->output = out(context, 0, {s.batch, s.tokens, s.heads * s.value_dim});
  call->present_head_map = static_cast<std::int32_t*>(out(context, map_output, {s.batch, s.heads}));
  attend(*call, isa_, executor(context));
}

OpKernel* make_kernel(const OrtKernelInfo* info, const Signature& signature, Storage storage, Storage keys,
                      Storage values) {
  if (signature.version == 1) return new KernelV1(info, storage, signature);
  return new KernelV2(info, storage, keys, values, signature);
}

}  // namespace chai::ort
