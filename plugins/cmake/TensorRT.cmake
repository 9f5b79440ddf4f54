# CHAI_HAS_CUDA, CHAI_HAS_TENSORRT: whether the toolkit is there, and TensorRT's headers with it. Neither a GPU nor a
# driver is needed to compile, nor TensorRT's library (TensorRT_LIBRARY), which programs link.
set(CHAI_MIN_CUDA 12.8)  # cudaLibraryLoadData and cudaLibraryGetKernel
set(CHAI_HAS_CUDA OFF)
set(CHAI_HAS_TENSORRT OFF)
find_package(CUDAToolkit QUIET)
if(CUDAToolkit_FOUND AND NOT CUDAToolkit_VERSION VERSION_LESS CHAI_MIN_CUDA)
  find_package(Threads REQUIRED)
  set(CHAI_HAS_CUDA ON)
else()
  message(STATUS "No CUDA toolkit ${CHAI_MIN_CUDA} or newer was found: the op is built for CPUs only. "
                 "Set CUDAToolkit_ROOT.")
endif()

# Looked for anew each time: a build folder that is kept must follow TensorRT_ROOT to another version.
find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h NO_CACHE HINTS "${TensorRT_ROOT}" "$ENV{TensorRT_ROOT}"
  PATH_SUFFIXES include include/x86_64-linux-gnu)
if(NOT TensorRT_INCLUDE_DIR)
  message(STATUS "TensorRT's headers were not found: libchai_tensorrt.so is not built. Set TensorRT_ROOT to a "
                 "directory with include/NvInferRuntime.h (a TensorRT installation, or a clone of NVIDIA/TensorRT).")
  return()
endif()
if(NOT CHAI_HAS_CUDA)
  message(WARNING "No CUDA toolkit ${CHAI_MIN_CUDA} or newer was found: libchai_tensorrt.so is not built. "
                  "Set CUDAToolkit_ROOT.")
  return()
endif()
find_library(TensorRT_LIBRARY NAMES nvinfer nvinfer_lean NO_CACHE HINTS "${TensorRT_ROOT}" "$ENV{TensorRT_ROOT}"
  PATH_SUFFIXES lib lib64)
set(CHAI_HAS_TENSORRT ON)
