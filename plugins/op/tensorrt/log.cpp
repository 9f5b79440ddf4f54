#include "op/tensorrt/log.h"

#include <atomic>

#include "op/tensorrt/runtime_library.h"
#include "support/log.h"

namespace chai::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* logger() {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  nvinfer1::ILogger* found = finder != nullptr ? finder->findLogger() : nullptr;
  return found != nullptr ? found : find_logger();
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) {
  nvinfer1::ILoggerFinder* none = nullptr;
  if (finder != nullptr) logger_finder.compare_exchange_strong(none, finder);
}

void log(nvinfer1::ILogger::Severity severity, const std::string& message) noexcept {
  if (nvinfer1::ILogger* target = logger()) {
    target->log(severity, message.c_str());
  } else if (severity <= nvinfer1::ILogger::Severity::kWARNING) {
    log_to_stderr("", message.c_str());
  }
}

}  // namespace chai::tensorrt
