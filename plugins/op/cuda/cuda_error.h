// Failures of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace chai::cuda {

inline void require(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw std::runtime_error(what + " failed: " + cudaGetErrorString(status));
}

}  // namespace chai::cuda
