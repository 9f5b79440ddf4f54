# CHAI_HAS_CUDA, CHAI_HAS_TENSORRT: whether the toolkit is there, and TensorRT's headers with it. Neither a GPU nor a
# driver is needed to compile, nor TensorRT's library (TensorRT_LIBRARY), which programs link.
set(CHAI_MIN_CUDA 12.8)  # cudaLibraryLoadData and cudaLibraryGetKernel
set(CHAI_HAS_CUDA OFF)
set(CHAI_HAS_TENSORRT OFF)

# Looked for anew each time: a build folder that is kept must follow TensorRT_ROOT to another version.
find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h NO_CACHE HINTS "${TensorRT_ROOT}" "$ENV{TensorRT_ROOT}"
  PATH_SUFFIXES include include/x86_64-linux-gnu)
if(NOT TensorRT_INCLUDE_DIR)
  message(STATUS "TensorRT's headers were not found: libchai_tensorrt.so is not built. Set TensorRT_ROOT to a "
                 "directory with include/NvInferRuntime.h (a TensorRT installation, or a clone of NVIDIA/TensorRT).")
  return()
endif()
find_package(CUDAToolkit QUIET)
if(NOT CUDAToolkit_FOUND OR CUDAToolkit_VERSION VERSION_LESS CHAI_MIN_CUDA)
  message(WARNING "No CUDA toolkit ${CHAI_MIN_CUDA} or newer was found: libchai_tensorrt.so is not built. "
                  "Set CUDAToolkit_ROOT.")
  return()
endif()
find_package(Threads REQUIRED)
find_library(TensorRT_LIBRARY NAMES nvinfer nvinfer_lean NO_CACHE HINTS "${TensorRT_ROOT}" "$ENV{TensorRT_ROOT}"
  PATH_SUFFIXES lib lib64)
set(CHAI_HAS_CUDA ON)
set(CHAI_HAS_TENSORRT ON)
