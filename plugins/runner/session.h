// What the generation loop needs of a back end.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace chai {

// New tokens for every row of a batch: B rows of S tokens, of which N want logits (1 in the runner).
struct Step {
  std::vector<std::int64_t> input_ids;         // [B][S], padded on the right
  std::vector<std::int32_t> lengths;           // [B], valid tokens; 0 leaves a row alone
  std::vector<std::int32_t> past_lengths;      // [B], tokens in the cache; 0 starts a row afresh
  std::vector<std::int64_t> output_positions;  // [B][N], which of the S tokens
};

// One loaded model with the caches of one batch.
class Session {
 public:
  static constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

  virtual ~Session() = default;

  // Whether a step appends to the caches where they lie; if not, there are two sets of them.
  virtual bool in_place() const = 0;
  // Whether attention needs no memory that grows with new tokens times capacity.
  virtual bool bounded_scratch() const = 0;
  // Whether caches can be enlarged; otherwise begin() gets all that may be needed.
  virtual bool can_grow() const = 0;
  // Most new tokens of a row in one step.
  virtual std::int64_t max_tokens() const = 0;
  // Tokens that fit in each row.
  virtual std::int64_t capacity() const = 0;
  // Starts a batch of empty rows.
  virtual void begin(std::int64_t batch, std::int64_t capacity) = 0;
  // Enlarges the caches, keeping their content.
  virtual void grow(std::int64_t capacity) = 0;
  // Returns the logits [B][N][V], valid until the next call.
  virtual const std::vector<float>& step(const Step& step) = 0;
};

}  // namespace chai
