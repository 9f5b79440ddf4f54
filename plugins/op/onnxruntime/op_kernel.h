// The kernels behind the ops: one class per version, made for the types of one node.
#pragma once

#include "chai/attention.h"
#include "op/onnxruntime/kernel_context.h"

namespace chai::ort {

// What tells the ops and their versions apart.
struct Signature {
  const char* op;
  std::int64_t version;
  const schema::Parameter* inputs;
  std::size_t num_inputs;
  const schema::Parameter* outputs;
  std::size_t num_outputs;
  bool shared;  // reads the caches that another node gives
};

extern const Signature kOwnV1, kSharedV1, kOwnV2, kSharedV2;

class OpKernel {
 public:
  // Reads the attributes that every version has.
  OpKernel(const OrtKernelInfo* info, Storage storage, const Signature& signature);
  virtual ~OpKernel() = default;
  virtual void compute(OrtKernelContext* context) const = 0;

 protected:
  Tensor in(const OrtKernelContext* context, std::size_t index) const {
    return input(context, signature_.op, signature_.inputs[index], index);
  }
  void* out(OrtKernelContext* context, std::size_t index, const Dims& dims) const {
    return output(context, signature_.op, index, dims);
  }
  // Refuses an input whose sizes differ; one that the node leaves out has none.
  void expect(std::size_t index, const Tensor& tensor, const Dims& dims) const;
  // Checks the call, asks for the outputs that every version has, and evaluates it.
  void evaluate(OrtKernelContext* context, AttentionCall* call, std::size_t map_output) const;
  void check_call(const AttentionCall& call) const;

  const Signature& signature_;
  AttentionCall call_;

 private:
  Isa isa_ = Isa::kPortable;
};

// Versions 1 and 2 with storage `keys` and `values` of the caches (version 1: that of T).
OpKernel* make_kernel(const OrtKernelInfo* info, const Signature& signature, Storage storage, Storage keys,
                      Storage values);

}  // namespace chai::ort
