// Comparing a loaded graph with its manifest, before garbage can come out.
#pragma once

#include "runner/backends/onnxruntime/library.h"
#include "runner/manifest.h"

namespace chai {

// Throws std::runtime_error naming the first input or output that is missing or has another type or shape.
void check_graph(const Ort::Session& session, const Manifest& manifest);

}  // namespace chai
