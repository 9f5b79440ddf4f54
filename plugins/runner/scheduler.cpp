#include "runner/scheduler.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>

#include "runner/calls.h"

namespace chai {

void Scheduler::run(std::vector<Request>& requests, std::size_t slots) {
  std::deque<Request*> waiting;
  for (Request& request : requests) waiting.push_back(&request);
  rows_.assign(std::min(slots, requests.size()), nullptr);
  session_.drop();
  session_.start(static_cast<std::int64_t>(rows_.size()), pool_pages(requests));
  while (true) {
    admit(waiting);
    if (idle()) return;
    step();
  }
}

// What the longest of as many texts as there are rows may need, within the budget. One text always fits: its
// limits were set by the budget when the call began.
std::int64_t Scheduler::pool_pages(const std::vector<Request>& requests) const {
  const std::int64_t length = session_.page_length();
  std::vector<std::int64_t> wanted;
  for (const Request& request : requests)
    wanted.push_back((most_tokens(request, limits_) + length - 1) / length);
  std::sort(wanted.begin(), wanted.end(), std::greater<>());
  const std::int64_t all = std::accumulate(
      wanted.begin(), wanted.begin() + static_cast<std::ptrdiff_t>(rows_.size()), std::int64_t{0});
  return std::max(wanted[0], std::min(all, session_.room().tokens / length));
}

bool Scheduler::idle() const {
  return std::all_of(rows_.begin(), rows_.end(), [](const Request* row) { return row == nullptr; });
}

// In the order of the prompts: one that finds no room waits, and those behind it too.
void Scheduler::admit(std::deque<Request*>& waiting) {
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    if (rows_[row] != nullptr || waiting.empty()) continue;
    if (!session_.promise(static_cast<std::int64_t>(row), most_tokens(*waiting.front(), limits_))) break;
    rows_[row] = waiting.front();
    waiting.pop_front();
  }
  if (!waiting.empty() && idle())
    throw std::runtime_error(
        "a row of " + std::to_string(most_tokens(*waiting.front(), limits_)) +
        " tokens has no memory left for its KV cache; lower max_seq, give shorter prompts, or " +
        session_.room().budget.fix);
}

void Scheduler::step() {
  const auto active =
      static_cast<std::int64_t>(rows_.size()) - std::count(rows_.begin(), rows_.end(), nullptr);
  const std::int64_t chunk =
      chunk_length(session_.bounded_scratch(), active, geometry_.num_query_heads, session_.capacity());
  std::vector<Fed> all;
  std::vector<std::int64_t> lengths;
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    if (rows_[row] == nullptr) continue;
    const Window window = next_window(*rows_[row], geometry_.probe_tokens, chunk);
    all.push_back({row, window});
    lengths.push_back(window.end - window.start);
  }
  for (const std::vector<std::size_t>& members : plan_calls(lengths)) {
    std::vector<Fed> fed;
    for (const std::size_t member : members) fed.push_back(all[member]);
    call(fed);
  }
}

// One call of the graph.
void Scheduler::call(const std::vector<Fed>& fed) {
  std::int64_t tokens = 0;
  for (const auto& [_, window] : fed) tokens = std::max(tokens, window.end - window.start);
  Step step;
  std::vector<std::int64_t> rows;
  step.input_ids.assign(fed.size() * static_cast<std::size_t>(tokens), 0);
  for (std::size_t line = 0; line < fed.size(); ++line) {
    const auto [start, end] = fed[line].window;
    std::copy(rows_[fed[line].row]->ids.begin() + start, rows_[fed[line].row]->ids.begin() + end,
              step.input_ids.begin() + static_cast<std::int64_t>(line) * tokens);
    step.lengths.push_back(static_cast<std::int32_t>(end - start));
    step.past_lengths.push_back(static_cast<std::int32_t>(start));
    step.output_positions.push_back(end - start - 1);
    rows.push_back(static_cast<std::int64_t>(fed[line].row));
  }
  const std::vector<float>& logits = session_.step(step, rows);
  for (std::size_t line = 0; line < fed.size(); ++line) {
    Request& request = *rows_[fed[line].row];
    request.cached = fed[line].window.end;
    if (request.cached < static_cast<std::int64_t>(request.ids.size())) continue;
    const float* scores = logits.data() + line * static_cast<std::size_t>(geometry_.vocab_size);
    if (!accept(request, limits_, scores, geometry_.vocab_size, on_token_)) continue;
    session_.release(rows[line]);
    rows_[fed[line].row] = nullptr;
  }
}

}  // namespace chai
