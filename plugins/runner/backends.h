// Opening a bundle with one of the back ends that this library was built with.
#pragma once

#include <memory>
#include <string>

#include "runner/manifest.h"
#include "runner/session.h"

namespace chai {

// The back end's name in manifest.json.
const char* name(Backend backend);

// Throws std::runtime_error if the back end is not there or cannot run this bundle.
std::unique_ptr<Session> open_session(const std::string& bundle, const Manifest& manifest,
                                      const Options& options);

}  // namespace chai
