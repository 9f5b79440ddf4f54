// The kernel of chai::ClusteredHeadAttention for ONNX Runtime's CUDA provider: launches of compiled kernels.
#pragma once

#include <memory>
#include <mutex>

#include "op/cuda/kernel_library.h"
#include "op/onnxruntime/op_kernel.h"

namespace chai::ort {

// All tensors lie on the GPU. Only what shapes tell is checked; what tensors hold never leads the kernels out
// of them. Caches are updated in place where past and present are one buffer, else copied first.
class CudaKernel final : public Kernel {
 public:
  // Refuses attributes that do not fit `keys` and `values`, the storage of the caches.
  CudaKernel(const OrtKernelInfo* info, Storage storage, Storage keys, Storage values,
             cuda::KernelSource& source);
  void compute(OrtKernelContext* context) const override;

 private:
  struct Inputs;

  cuda::Symbols checked_sizes(const Inputs& inputs) const;
  const cuda::LoadedKernels& kernels_for(const cuda::Symbols& sizes, const Inputs& inputs) const;
  std::shared_ptr<const cuda::Plan> plan_for(const cuda::LoadedKernels& kernels,
                                             const cuda::Symbols& sizes) const;

  Storage storage_, keys_, values_;
  schema::clustered_head_attention::Attributes attributes_;
  cuda::KernelSource& source_;

  // Of the last call; calls may come from several threads.
  mutable std::mutex mutex_;
  mutable const cuda::LoadedKernels* planned_kernels_ = nullptr;
  mutable cuda::Symbols planned_sizes_;
  mutable std::shared_ptr<const cuda::Plan> plan_;
};

}  // namespace chai::ort
