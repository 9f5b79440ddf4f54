// Opening a bundle with one of the back ends that this library was built with.
#pragma once

#include <memory>
#include <string>

#include "manifest.h"
#include "session.h"

namespace chai {

// The back end's name in manifest.json.
const char* name(Backend backend);

// Throws std::runtime_error if the back end is not there or cannot run this bundle.
std::unique_ptr<Session> open_session(const std::string& bundle, const Manifest& manifest,
                                      const Options& options);

// In tensorrt_backend.cpp; only where this library was built with TensorRT.
std::unique_ptr<Session> open_tensorrt_session(const std::string& bundle, const Manifest& manifest,
                                               const Options& options, const std::string& plugin);

}  // namespace chai
