// The op nodes of a bundle's graph against its manifest, which says what they are, too.
#pragma once

#include <string>

#include "runner/manifest.h"

namespace chai {

// Compares the numbers and attributes of the op nodes in a file model.onnx with the manifest; no weights are
// read. A runner that feeds fewer tokens at first than the graph's probe has, or lays out caches as the graph
// does not, would give another text and no error. Throws std::runtime_error if they differ, or the graph
// cannot be read.
void check_op_nodes(const std::string& model, const Manifest& manifest);

}  // namespace chai
