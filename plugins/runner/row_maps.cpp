#include "runner/row_maps.h"

#include <algorithm>

namespace chai {

RowMaps::RowMaps(std::int64_t layers, std::int64_t rows, std::int64_t heads)
    : layers_(layers),
      rows_(rows),
      heads_(heads),
      maps_(static_cast<std::size_t>(layers * rows * heads), 0) {}

std::vector<std::int32_t> RowMaps::of(const std::vector<std::int64_t>& rows) const {
  std::vector<std::int32_t> maps;
  for (std::int64_t layer = 0; layer < layers_; ++layer) {
    for (const std::int64_t row : rows) {
      const auto first = maps_.begin() + place(layer, row);
      maps.insert(maps.end(), first, first + heads_);
    }
  }
  return maps;
}

void RowMaps::keep(const std::vector<std::int64_t>& rows, const std::int32_t* maps) {
  for (std::int64_t layer = 0; layer < layers_; ++layer) {
    for (const std::int64_t row : rows) {
      std::copy_n(maps, heads_, maps_.begin() + place(layer, row));
      maps += heads_;
    }
  }
}

}  // namespace chai
