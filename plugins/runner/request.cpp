#include "runner/request.h"

#include <algorithm>

namespace chai {
namespace {

constexpr std::int64_t kLongestChunk = 512;
// Elements of one score matrix when attention makes whole ones: 256 MiB of float32.
constexpr std::int64_t kScores = std::int64_t{1} << 26;

}  // namespace

std::int64_t chunk_length(bool bounded_scratch, std::int64_t rows, std::int64_t query_heads,
                          std::int64_t capacity) {
  if (bounded_scratch) return kLongestChunk;
  const std::int64_t scores = rows * query_heads * std::max<std::int64_t>(capacity, 1);
  return std::clamp(kScores / scores, std::int64_t{1}, kLongestChunk);
}

// While fewer tokens than the probe are cached the head map is not settled, and all of them go in again as a
// fresh row. A fresh row's first chunk holds the whole probe if there is one.
Window next_window(const Request& request, std::int64_t probe_tokens, std::int64_t chunk) {
  const std::int64_t start = request.cached >= probe_tokens ? request.cached : 0;
  const auto all = static_cast<std::int64_t>(request.ids.size());
  return {start, std::min(all, start + std::max(chunk, probe_tokens))};
}

std::int64_t most_tokens(const Request& request, const Limits& limits) {
  const std::int64_t text = limits.max_new_tokens - 1;
  if (text > limits.max_positions - request.prompt_tokens) return limits.max_positions;
  return request.prompt_tokens + text;
}

bool accept(Request& request, const Limits& limits, const float* logits, std::int64_t vocab_size,
            const OnToken& on_token) {
  const std::int64_t token =
      request.sampler.choose(logits, static_cast<std::size_t>(vocab_size), request.ids);
  request.ids.push_back(token);
  if (on_token) on_token(request.index, token);
  const auto& eos = limits.eos_token_ids;
  const auto tokens = static_cast<std::int64_t>(request.ids.size());
  if (std::find(eos.begin(), eos.end(), token) != eos.end()) {
    request.stop_reason = StopReason::kEos;
  } else if (tokens - request.prompt_tokens >= limits.max_new_tokens) {
    request.stop_reason = StopReason::kLength;
  } else if (tokens > limits.max_positions) {
    // The token just chosen would have to be fed at a position that does not exist.
    request.stop_reason = StopReason::kCapacity;
  } else {
    return false;
  }
  return true;
}

}  // namespace chai
