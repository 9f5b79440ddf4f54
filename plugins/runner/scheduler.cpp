#include "runner/scheduler.h"

#include <algorithm>
#include <deque>

namespace chai {
namespace {

constexpr std::int64_t kFirstCapacity = 64;

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

void Scheduler::step() {
  const std::int64_t chunk = std::min(
      session_.max_tokens(), chunk_length(session_.bounded_scratch(), static_cast<std::int64_t>(rows_.size()),
                                          geometry_.num_query_heads, session_.capacity()));
  std::vector<Window> windows(rows_.size());
  std::int64_t tokens = 0;
  std::int64_t needed = 0;
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    if (rows_[row] == nullptr) continue;
    windows[row] = next_window(*rows_[row], geometry_.probe_tokens, chunk);
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
    const float* scores = logits.data() + row * static_cast<std::size_t>(geometry_.vocab_size);
    if (accept(*request, limits_, scores, geometry_.vocab_size, on_token_)) rows_[row] = nullptr;
  }
}

void Scheduler::make_room(std::int64_t needed) {
  std::int64_t capacity = session_.capacity();
  if (needed <= capacity) return;
  while (capacity < needed) capacity *= 2;
  session_.grow(std::min(capacity, limits_.max_positions));
}

}  // namespace chai
