// The head maps of a pool's rows: query head to representative, by layer and row. They travel with each call.
#pragma once

#include <cstdint>
#include <vector>

namespace chai {

class RowMaps {
 public:
  RowMaps() = default;
  // All zero; a fresh row's map is not read.
  RowMaps(std::int64_t layers, std::int64_t rows, std::int64_t heads);

  // [layers][rows][heads]
  const std::vector<std::int32_t>& all() const { return maps_; }
  // Those of some rows: [layers][rows.size()][heads].
  std::vector<std::int32_t> of(const std::vector<std::int64_t>& rows) const;
  // The other way.
  void keep(const std::vector<std::int64_t>& rows, const std::int32_t* maps);

 private:
  std::vector<std::int32_t>::difference_type place(std::int64_t layer, std::int64_t row) const {
    return (layer * rows_ + row) * heads_;
  }

  std::int64_t layers_ = 0;
  std::int64_t rows_ = 0;
  std::int64_t heads_ = 0;
  std::vector<std::int32_t> maps_;
};

}  // namespace chai
