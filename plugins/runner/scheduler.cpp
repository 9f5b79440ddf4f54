#include "runner/scheduler.h"

#include <algorithm>

namespace chai {
namespace {

constexpr std::int64_t kLongestChunk = 512;
constexpr std::int64_t kFirstCapacity = 64;
// Elements of one score matrix when attention makes whole ones: 256 MiB of float32.
constexpr std::int64_t kScores = std::int64_t{1} << 26;

}  // namespace

void Scheduler::run(std::vector<Request>& requests, std::size_t slots) {
  std::deque<Request*> waiting;
  for (Request& request : requests) waiting.push_back(&request);
  rows_.assign(std::min(slots, requests.size()), nullptr);
  session_.begin(static_cast<std::int64_t>(rows_.size()), capacity_for(requests));
  while (true) {
    for (Request*& row : rows_) {
      if (row != nullptr || waiting.empty()) continue;
      row = waiting.front();
      waiting.pop_front();
    }
    if (std::all_of(rows_.begin(), rows_.end(), [](const Request* row) { return row == nullptr; })) return;
    step();
  }
}

std::int64_t Scheduler::capacity_for(const std::vector<Request>& requests) const {
  // At most this many are set aside for the text at first where caches can grow.
  const std::int64_t text =
      session_.can_grow() ? std::min(limits_.max_new_tokens, kFirstCapacity) : limits_.max_new_tokens;
  std::int64_t longest = 0;
  for (const Request& request : requests) longest = std::max(longest, request.prompt_tokens);
  const std::int64_t needed = text > limits_.max_positions - longest ? limits_.max_positions : longest + text;
  return std::min(limits_.max_positions, (needed + kFirstCapacity - 1) / kFirstCapacity * kFirstCapacity);
}

std::int64_t Scheduler::chunk_length() const {
  std::int64_t chunk = std::min(kLongestChunk, session_.max_tokens());
  if (!session_.bounded_scratch()) {
    const auto rows = static_cast<std::int64_t>(rows_.size());
    chunk = std::clamp(kScores / (rows * geometry_.num_query_heads * session_.capacity()), std::int64_t{1},
                       chunk);
  }
  return chunk;
}

// While fewer tokens than the probe are cached the head map is not settled, and all of them go in again as a
// fresh row. A fresh row's first chunk holds the whole probe if there is one.
Scheduler::Window Scheduler::next_window(const Request& request, std::int64_t chunk) const {
  const std::int64_t start = request.cached >= geometry_.probe_tokens ? request.cached : 0;
  const auto all = static_cast<std::int64_t>(request.ids.size());
  return {start, std::min(all, start + std::max(chunk, geometry_.probe_tokens))};
}

void Scheduler::step() {
  const std::int64_t chunk = chunk_length();
  std::vector<Window> windows(rows_.size());
  std::int64_t tokens = 0;
  std::int64_t needed = 0;
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    if (rows_[row] == nullptr) continue;
    windows[row] = next_window(*rows_[row], chunk);
    tokens = std::max(tokens, windows[row].end - windows[row].start);
    needed = std::max(needed, windows[row].end);
  }
  make_room(needed);

  Step step;
  step.input_ids.assign(rows_.size() * static_cast<std::size_t>(tokens), 0);
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    const auto [start, end] = windows[row];
    const std::int64_t length = end - start;
    if (rows_[row] != nullptr)
      std::copy_n(rows_[row]->ids.begin() + start, length,
                  step.input_ids.begin() + static_cast<std::int64_t>(row) * tokens);
    step.lengths.push_back(static_cast<std::int32_t>(length));
    step.past_lengths.push_back(static_cast<std::int32_t>(start));
    step.output_positions.push_back(std::max<std::int64_t>(length - 1, 0));
  }
  const std::vector<float>& logits = session_.step(step);

  for (std::size_t row = 0; row < rows_.size(); ++row) {
    Request* request = rows_[row];
    if (request == nullptr) continue;
    request->cached = windows[row].end;
    if (request->cached < static_cast<std::int64_t>(request->ids.size())) continue;
    if (accept(*request, logits.data() + row * static_cast<std::size_t>(geometry_.vocab_size)))
      rows_[row] = nullptr;
  }
}

void Scheduler::make_room(std::int64_t needed) {
  std::int64_t capacity = session_.capacity();
  if (needed <= capacity) return;
  while (capacity < needed) capacity *= 2;
  session_.grow(std::min(capacity, limits_.max_positions));
}

// Chooses the next token; true if the text ends with it.
bool Scheduler::accept(Request& request, const float* logits) {
  const auto vocab_size = static_cast<std::size_t>(geometry_.vocab_size);
  const std::int64_t token = request.sampler.choose(logits, vocab_size, request.ids);
  request.ids.push_back(token);
  if (on_token_) on_token_(request.index, token);
  const auto& eos = limits_.eos_token_ids;
  const auto tokens = static_cast<std::int64_t>(request.ids.size());
  if (std::find(eos.begin(), eos.end(), token) != eos.end()) {
    request.stop_reason = StopReason::kEos;
  } else if (tokens - request.prompt_tokens >= limits_.max_new_tokens) {
    request.stop_reason = StopReason::kLength;
  } else if (tokens > limits_.max_positions) {
    // The token just chosen would have to be fed at a position that does not exist.
    request.stop_reason = StopReason::kCapacity;
  } else {
    return false;
  }
  return true;
}

}  // namespace chai
