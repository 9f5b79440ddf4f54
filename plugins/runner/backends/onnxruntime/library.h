// ONNX Runtime, opened when it is first needed: programs link nothing of it, and any version from 1.18 on
// will do.
#pragma once

#include <string>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace chai {

// The process's environment of ONNX Runtime. The first call opens the library: `path`, or if that is empty
// the places that chai/runner.h lists. Throws std::runtime_error.
Ort::Env& onnxruntime_environment(const std::string& path);

}  // namespace chai
