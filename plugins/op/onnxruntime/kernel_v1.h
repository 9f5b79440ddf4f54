// Version 1 of the ops: a pool with one page per row.
#pragma once

#include "op/onnxruntime/op_kernel.h"

namespace chai::ort {

class KernelV1 : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void compute(OrtKernelContext* context) const override;
};

}  // namespace chai::ort
