// Version 2 of the ops: caches in pages, stored in 32, 16, 8 or 4 bits.
#pragma once

#include "op/onnxruntime/op_kernel.h"

namespace chai::ort {

class KernelV2 : public OpKernel {
 public:
  KernelV2(const OrtKernelInfo* info, Storage storage, Storage keys, Storage values,
           const Signature& signature);
  void compute(OrtKernelContext* context) const override;

 private:
  // One cache as the node has it.
  struct Cache {
    std::size_t at, scales_at;  // inputs
    Tensor rows, scales;
  };
  Cache cache(const OrtKernelContext* context, std::size_t at, std::size_t scales_at, std::int64_t heads,
              std::int64_t dim, const AttentionCall& call, const Pool& pool) const;
  void bind(OrtKernelContext* context, const Cache& cache, std::size_t output_at,
            std::size_t scales_output_at, Pool* pool) const;
};

}  // namespace chai::ort
