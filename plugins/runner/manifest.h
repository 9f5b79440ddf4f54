// What a runner needs of a bundle's manifest.json, checked.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "runner/geometry.h"

namespace chai {

// Of tensors. A model's is one of the first three.
enum class ItemType { kFloat32, kFloat16, kBfloat16, kInt8, kUint8 };

// In bytes.
inline std::int64_t item_size(ItemType type) {
  if (type == ItemType::kFloat32) return 4;
  return type == ItemType::kInt8 || type == ItemType::kUint8 ? 1 : 2;
}

// Sizes in bytes by path, relative to the bundle and with forward slashes.
using Files = std::map<std::string, std::int64_t>;

struct EngineRecord {
  std::int64_t max_batch = 0;
  std::int64_t max_seq = 0;
  std::int64_t cache_memory = 0;  // bytes that caches may take unless a program says otherwise; 0: no limit
  bool has_plugin = false;
  bool is_of_this_model = false;
  Files files;
};

struct Manifest {
  ItemType item_type = ItemType::kFloat32;
  Geometry geometry;
  // How keys and values are stored, by layer: 0 (in the item type), 16 (float16), 8 or 4.
  std::vector<std::int64_t> key_bits;
  std::vector<std::int64_t> value_bits;
  std::int64_t group = 0;             // elements that share a scale
  std::vector<std::int64_t> windows;  // by layer, 0: none; empty: none anywhere
  std::optional<std::int64_t> max_positions;
  bool has_static_membership = false;
  bool switches_rope = false;  // rotary factors follow the length of a row
  std::vector<std::int64_t> eos_token_ids;
  std::optional<std::int64_t> top_k;
  std::optional<double> top_p;
  std::optional<double> repetition_penalty;
  Files files;
  std::map<std::string, EngineRecord> engines;  // by name of the back end
};

// Throws std::runtime_error: not a bundle, another format or op version, a wrong field, or a file that is
// missing, lies outside the bundle or has another size than the manifest says. Contents are not hashed;
// `chai-export inspect` does. Files of engines are left to those who run them.
Manifest read_manifest(const std::string& bundle);

// The check of files that read_manifest makes.
void check_files(const std::string& bundle, const Files& files, const std::string& again);

}  // namespace chai
