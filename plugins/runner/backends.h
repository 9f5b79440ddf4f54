// Opening a bundle with one of the back ends that this library was built with.
#pragma once

#include <memory>
#include <string>

#include "runner/manifest.h"
#include "runner/paged_session.h"
#include "runner/session.h"

namespace chai {

// The back end's name in manifest.json.
const char* name(Backend backend);

// Of a bundle of version 1 of the op. Throws std::runtime_error if the back end is not there or cannot run
// this bundle.
std::unique_ptr<Session> open_session(const std::string& bundle, const Manifest& manifest,
                                      const Options& options);

// Of a bundle of version 2, whose caches are in pages. Throws likewise.
std::unique_ptr<PagedSession> open_paged_session(const std::string& bundle, const Manifest& manifest,
                                                 const Options& options);

}  // namespace chai
