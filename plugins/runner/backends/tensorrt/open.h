// Opening a bundle's TensorRT engine.
#pragma once

#include <memory>
#include <string>

#include "chai/runner.h"
#include "runner/manifest.h"
#include "runner/session.h"

namespace chai {

// `plugin` is the path of libchai_tensorrt.so. Throws std::runtime_error if the engine is missing, is not of
// this model, or does not fit the manifest.
std::unique_ptr<Session> open_tensorrt_session(const std::string& bundle, const Manifest& manifest,
                                               const Options& options, const std::string& plugin);

}  // namespace chai
