// Where the rows of one head of one batch row lie: in the pages that the row's table names.
#pragma once

#include <cstdint>

#include "chai/inline.h"

namespace chai {

// Consecutive rows in memory. Scales are float16, row by row.
struct RowBlock {
  char* rows;
  std::uint16_t* scales;
  std::int64_t count;
  // Rows that are read next, to be brought nearer meanwhile; null: none. At least as many as `count`, but at
  // the end of a range.
  const char* ahead = nullptr;
  const char* scales_ahead = nullptr;  // of those rows
};

// Position p is row p % page_size of page table[p / page_size].
struct PagedRows {
  char* rows;             // of this head in page 0
  std::uint16_t* scales;  // likewise
  const std::int32_t* table;
  std::int64_t page_size;
  std::int64_t page_bytes, row_bytes;    // from page to page, from row to row
  std::int64_t page_scales, row_scales;  // likewise, in numbers

  // The rows from `begin` on that lie in one page, up to `end` at the most.
  CHAI_INLINE RowBlock block(std::int64_t begin, std::int64_t end) const {
    const std::int64_t page = table[begin / page_size], offset = begin % page_size;
    const std::int64_t left = page_size - offset;
    return {rows + page * page_bytes + offset * row_bytes,
            scales == nullptr ? nullptr : scales + page * page_scales + offset * row_scales,
            end - begin < left ? end - begin : left};
  }
};

// Bytes of a block up to which the next one stays in the L2 cache until it is read.
constexpr std::int64_t kMostAhead = std::int64_t{1} << 17;

// body(block, first position of the block) for each page of [begin, end).
template <typename Body>
CHAI_INLINE void for_each_block(const PagedRows& paged, std::int64_t begin, std::int64_t end,
                                const Body& body) {
  while (begin < end) {
    RowBlock block = paged.block(begin, end);
    const std::int64_t next = begin + block.count;
    if (next < end && block.count * paged.row_bytes <= kMostAhead) {
      const RowBlock then = paged.block(next, end);
      block.ahead = then.rows;
      block.scales_ahead = reinterpret_cast<const char*>(then.scales);
    }
    body(block, begin);
    begin = next;
  }
}

}  // namespace chai
