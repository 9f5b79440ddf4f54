// The kernels behind the ops, made for the types of one node: what they have in common, and the CPU's.
#pragma once

#include "chai/attention.h"
#include "op/onnxruntime/kernel_context.h"

namespace chai::ort {

// What tells the two ops apart.
struct Signature {
  const char* op;
  const schema::Parameter* inputs;
  std::size_t num_inputs;
  const schema::Parameter* outputs;
  std::size_t num_outputs;
  bool shared;  // reads the caches that another node gives
};

extern const Signature kOwn, kShared;

// What ONNX Runtime holds of a node.
class Kernel {
 public:
  virtual ~Kernel() = default;
  // Throws Failure or an exception of the standard library; nothing has been written then.
  virtual void compute(OrtKernelContext* context) const = 0;
};

// The attributes of a node. Refuses those that do not fit the storage of its caches.
schema::clustered_head_attention::Attributes read_attributes(const OrtKernelInfo* info, const char* op,
                                                             Storage storage, Storage keys, Storage values);

class OpKernel final : public Kernel {
 public:
  // `keys` and `values` are the storage of the caches. Refuses attributes that do not fit them.
  OpKernel(const OrtKernelInfo* info, Storage storage, Storage keys, Storage values,
           const Signature& signature);
  void compute(OrtKernelContext* context) const override;

 private:
  // One cache as the node has it.
  struct Cache {
    std::size_t at, scales_at;  // inputs
    Tensor rows, scales;
  };

  Tensor in(const OrtKernelContext* context, std::size_t index) const {
    return input(context, signature_.op, signature_.inputs[index], index);
  }
  void* out(OrtKernelContext* context, std::size_t index, const Dims& dims) const {
    return output(context, signature_.op, index, dims);
  }
  // Refuses an input whose sizes differ; one that the node leaves out has none.
  void expect(std::size_t index, const Tensor& tensor, const Dims& dims) const;
  Cache cache(const OrtKernelContext* context, std::size_t at, std::size_t scales_at, std::int64_t heads,
              std::int64_t dim, const AttentionCall& call, const Pool& pool) const;
  void bind(OrtKernelContext* context, const Cache& cache, std::size_t output_at,
            std::size_t scales_output_at, Pool* pool) const;

  const Signature& signature_;
  AttentionCall call_;
  Isa isa_ = Isa::kPortable;
};

}  // namespace chai::ort
