#include "runner/caches.h"

namespace chai {
namespace {

// What rows of a layer's keys or values are stored as.
struct Part {
  const char* name;
  std::int64_t heads;
  std::int64_t dim;
  std::int64_t bits;

  bool quantised() const { return bits == 8 || bits == 4; }
};

ItemType code_type(const Part& part, ItemType item_type) {
  switch (part.bits) {
    case 16:
      return ItemType::kFloat16;
    case 8:
      return ItemType::kInt8;
    case 4:
      return ItemType::kUint8;  // two codes
    default:
      return item_type;
  }
}

}  // namespace

std::vector<CacheTensor> cache_tensors(const Manifest& manifest, Heads heads) {
  const Geometry& geometry = manifest.geometry;
  std::vector<CacheTensor> tensors;
  for (std::int64_t layer = 0; layer < geometry.num_layers; ++layer) {
    if (!geometry.has_cache(layer)) continue;
    const std::string number = "." + std::to_string(layer);
    const auto at = static_cast<std::size_t>(layer);
    const Part parts[] = {
        {"key", geometry.cached_heads(heads, layer), geometry.head_dim, manifest.key_bits[at]},
        {"value", geometry.num_kv_heads, geometry.value_head_dim, manifest.value_bits[at]}};
    for (const Part& part : parts)
      tensors.push_back({part.name + number, code_type(part, manifest.item_type), part.heads,
                         part.bits == 4 ? part.dim / 2 : part.dim});
    for (const Part& part : parts)
      if (part.quantised())  // a scale for each group, with 4 bits a minimum too
        tensors.push_back({std::string(part.name) + "_scales" + number, ItemType::kFloat16, part.heads,
                           part.dim / manifest.group * (part.bits == 4 ? 2 : 1)});
  }
  return tensors;
}

std::int64_t bytes_per_token(const std::vector<CacheTensor>& tensors) {
  std::int64_t bytes = 0;
  for (const CacheTensor& tensor : tensors) bytes += tensor.bytes_per_token();
  return bytes;
}

}  // namespace chai
