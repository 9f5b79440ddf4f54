// The tensors that the K and V caches of a bundle are, layer by layer: K, V, the scales of K and those of V,
// where there are any.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "chai/runner.h"
#include "runner/manifest.h"

namespace chai {

// [pages][heads][positions of a page][columns].
struct CacheTensor {
  std::string name;  // of the graph's input and output, without graph::kPast and graph::kPresent
  ItemType type = ItemType::kFloat32;
  std::int64_t heads = 0;
  std::int64_t columns = 0;

  std::int64_t bytes_per_token() const { return heads * columns * item_size(type); }
};

std::vector<CacheTensor> cache_tensors(const Manifest& manifest, Heads heads);

// Of one row, over all of them.
std::int64_t bytes_per_token(const std::vector<CacheTensor>& tensors);

}  // namespace chai
