// One prompt on its way to a text: its tokens, those that go in next, and when it ends.
#pragma once

#include <cstdint>
#include <vector>

#include "chai/runner.h"
#include "runner/sampler.h"

namespace chai {

// `cached` tokens of `ids` are in the cache.
struct Request {
  std::size_t index = 0;
  std::vector<std::int64_t> ids;
  std::int64_t prompt_tokens = 0;
  Sampler sampler;
  std::int64_t cached = 0;
  StopReason stop_reason = StopReason::kLength;
};

struct Limits {
  std::int64_t max_new_tokens = 0;
  std::int64_t max_positions = 0;
  std::vector<std::int64_t> eos_token_ids;
};

// Positions start … end - 1 of a text.
struct Window {
  std::int64_t start = 0;
  std::int64_t end = 0;
};

// New tokens of a row in one step, so that a step's scratch memory stays bounded. `bounded_scratch` is as in
// a session, `capacity` that of the longest row.
std::int64_t chunk_length(bool bounded_scratch, std::int64_t rows, std::int64_t query_heads,
                          std::int64_t capacity);

// The tokens to feed next.
Window next_window(const Request& request, std::int64_t probe_tokens, std::int64_t chunk);

// Positions that prompt and text can take at most; the last token of a text is not fed.
std::int64_t most_tokens(const Request& request, const Limits& limits);

// Chooses the next token from logits [vocab_size]; true if the text ends with it.
bool accept(Request& request, const Limits& limits, const float* logits, std::int64_t vocab_size,
            const OnToken& on_token);

}  // namespace chai
