// The generation loop: requests share the rows of one batch, each in its own phase. A row is prefilled in
// chunks, then decoded; when its text ends the next waiting prompt takes it.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "chai/runner.h"
#include "runner/geometry.h"
#include "runner/sampler.h"
#include "runner/session.h"

namespace chai {

// A prompt on its way to a text. `cached` tokens of `ids` are in the cache.
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

class Scheduler {
 public:
  Scheduler(Session& session, const Geometry& geometry, const Limits& limits, const OnToken& on_token)
      : session_(session), geometry_(geometry), limits_(limits), on_token_(on_token) {}

  // Generates until every request has ended, on at most `slots` rows.
  void run(std::vector<Request>& requests, std::size_t slots);

 private:
  struct Window {
    std::int64_t start = 0;
    std::int64_t end = 0;
  };

  std::int64_t capacity_for(const std::vector<Request>& requests) const;
  std::int64_t chunk_length() const;
  Window next_window(const Request& request, std::int64_t chunk) const;
  void step();
  void make_room(std::int64_t needed);
  bool accept(Request& request, const float* logits);

  Session& session_;
  const Geometry& geometry_;
  Limits limits_;
  const OnToken& on_token_;
  std::vector<Request*> rows_;
};

}  // namespace chai
