// The TensorRT library in this process, found at run time.
//
// The plugin library is not linked to TensorRT: the same file serves the full and the lean runtime, and loads
// where neither is.
#pragma once

#include <NvInferRuntime.h>

namespace chai::tensorrt {

// Null while no TensorRT library is loaded.
nvinfer1::IPluginRegistry* find_registry();
nvinfer1::ILogger* find_logger();

// Major version of the TensorRT in this process, 0 for none. Interfaces change between major versions, so it
// must be that of the headers this library was compiled with (NV_TENSORRT_MAJOR).
int runtime_major();

}  // namespace chai::tensorrt
