// What the generation loop needs of a back end: rows hold pages of a pool, and a call brings those it likes.
#pragma once

#include <cstdint>
#include <vector>

#include "runner/memory.h"

namespace chai {

// New tokens for some rows: B rows of S tokens, of which N want logits (1 in the runner).
struct Step {
  std::vector<std::int64_t> input_ids;         // [B][S], padded on the right
  std::vector<std::int32_t> lengths;           // [B], valid tokens
  std::vector<std::int32_t> past_lengths;      // [B], tokens in the cache; 0 starts a row afresh
  std::vector<std::int64_t> output_positions;  // [B][N], which of the S tokens
};

// One loaded model with the caches of one batch.
class Session {
 public:
  // Tokens that fit in a pool now, in whole pages, and what bounds them.
  struct Room {
    std::int64_t tokens = 0;
    Budget budget;
  };

  virtual ~Session() = default;

  // Whether a step appends to the caches where they lie; if not, there are two sets of them.
  virtual bool in_place() const = 0;
  // Whether attention needs no memory that grows with new tokens times capacity.
  virtual bool bounded_scratch() const = 0;
  // Positions of a page.
  virtual std::int64_t page_length() const = 0;
  // Tokens that the row with the largest promise may have.
  virtual std::int64_t capacity() const = 0;
  // Asked with no pool there, or for its budget alone: what a pool holds counts as taken.
  virtual Room room() const = 0;
  // Gives the memory of the caches back.
  virtual void drop() = 0;
  // Begins anew with so many empty rows that were promised nothing, and a pool of so many pages.
  virtual void start(std::int64_t rows, std::int64_t pages) = 0;
  // Promises a row room for `tokens` in all, if pages and memory for them are there.
  virtual bool promise(std::int64_t row, std::int64_t tokens) = 0;
  // Takes all pages from a row, whose text has ended.
  virtual void release(std::int64_t row) = 0;
  // Feeds at least one token to each of some rows: line b of the step is row rows[b]. Returns the logits
  // [B][N][V], valid until the next call.
  virtual const std::vector<float>& step(const Step& step, const std::vector<std::int64_t>& rows) = 0;
};

}  // namespace chai
