// Messages through TensorRT's logger, and the boundary at which exceptions become messages.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>
#include <utility>

namespace chai::tensorrt {

// The finder that TensorRT hands over when it loads the library; the first one stays.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);

// To TensorRT's logger; to stderr while none is known.
void log(nvinfer1::ILogger::Severity severity, const std::string& message) noexcept;

// Calls function(); when that throws, logs "ClusteredHeadAttention, <where>: <what>" and returns `failure`.
// TensorRT's interfaces are noexcept: nothing may leave them.
template <typename Result, typename Function>
Result guarded(const char* where, Result failure, Function&& function) noexcept {
  try {
    return std::forward<Function>(function)();
  } catch (const std::exception& error) {
    try {
      log(nvinfer1::ILogger::Severity::kERROR,
          std::string("ClusteredHeadAttention, ") + where + ": " + error.what());
    } catch (...) {
    }
  } catch (...) {
    log(nvinfer1::ILogger::Severity::kERROR, "ClusteredHeadAttention: unknown exception");
  }
  return failure;
}

}  // namespace chai::tensorrt
