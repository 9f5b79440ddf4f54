// Sizes of a model and of its caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "chai/runner.h"

namespace chai {

struct Geometry {
  std::int64_t num_layers = 0;
  std::int64_t num_query_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_head_dim = 0;
  std::int64_t vocab_size = 0;
  std::int64_t probe_tokens = 0;
  std::vector<std::int64_t> kept_heads;        // per layer
  std::vector<std::int64_t> windows;           // per layer: positions that a token sees; 0: all
  std::vector<std::int64_t> kv_source_layers;  // per layer: whose cache it reads, its own or an earlier one's

  // KV heads in the K cache of a layer.
  std::int64_t cached_heads(Heads heads, std::int64_t layer) const {
    return heads == Heads::kAll ? num_kv_heads : kept_heads[static_cast<std::size_t>(layer)];
  }
  // Whether a layer has a cache; the others read an earlier layer's.
  bool has_cache(std::int64_t layer) const {
    return kv_source_layers[static_cast<std::size_t>(layer)] == layer;
  }
  // The windows that caches have, ascending; 0 for those without one.
  std::set<std::int64_t> cache_windows() const {
    std::set<std::int64_t> found;
    for (std::int64_t layer = 0; layer < num_layers; ++layer)
      if (has_cache(layer)) found.insert(windows[static_cast<std::size_t>(layer)]);
    return found;
  }
  std::size_t num_caches() const {
    std::size_t count = 0;
    for (std::int64_t layer = 0; layer < num_layers; ++layer) count += has_cache(layer) ? 1 : 0;
    return count;
  }
};

}  // namespace chai
