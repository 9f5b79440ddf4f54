// What a runner needs of a bundle's manifest.json, checked.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "chai/runner.h"

namespace chai {

enum class ItemType { kFloat32, kFloat16, kBfloat16 };

struct EngineRecord {
  std::int64_t max_batch = 0;
  std::int64_t max_seq = 0;
  bool has_plugin = false;
  bool is_of_this_model = false;
};

struct Manifest {
  ItemType item_type = ItemType::kFloat32;
  std::int64_t num_layers = 0;
  std::int64_t num_query_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_head_dim = 0;
  std::int64_t vocab_size = 0;
  std::int64_t probe_tokens = 0;
  std::vector<std::int64_t> kept_heads;        // per layer
  std::vector<std::int64_t> kv_source_layers;  // per layer: the one whose cache it reads, itself or an earlier
  std::optional<std::int64_t> max_positions;
  bool has_static_membership = false;
  std::vector<std::int64_t> eos_token_ids;
  std::optional<std::int64_t> top_k;
  std::optional<double> top_p;
  std::optional<double> repetition_penalty;
  std::map<std::string, EngineRecord> engines;  // by name of the back end

  // KV heads in the K cache of a layer.
  std::int64_t cached_heads(Heads heads, std::int64_t layer) const;

  // Whether a layer has a cache; the others read an earlier layer's.
  bool has_cache(std::int64_t layer) const;
  std::size_t num_caches() const;
};

// Throws std::runtime_error: not a bundle, another format or op version, a wrong field, or a file that is
// missing or has another size than the manifest says. Contents are not hashed; `chai-export inspect` does.
Manifest read_manifest(const std::string& bundle);

}  // namespace chai
