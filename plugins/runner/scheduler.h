// The generation loop: rows come when there is room for all of their text, and go when it ends. The same
// order of things as chai_export/runtime/scheduler.py.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "chai/runner.h"
#include "runner/geometry.h"
#include "runner/request.h"
#include "runner/session.h"

namespace chai {

class Scheduler {
 public:
  Scheduler(Session& session, const Geometry& geometry, const Limits& limits, const OnToken& on_token)
      : session_(session), geometry_(geometry), limits_(limits), on_token_(on_token) {}

  // Generates until every request has ended, on at most `slots` rows. Throws std::runtime_error if memory
  // that was free when the call began is not any more, and nothing runs that would give some back.
  void run(std::vector<Request>& requests, std::size_t slots);

 private:
  // A row and the positions that it feeds.
  struct Fed {
    std::size_t row = 0;
    Window window;
  };

  std::int64_t pool_pages(const std::vector<Request>& requests) const;
  void admit(std::deque<Request*>& waiting);
  bool idle() const;
  void step();
  void call(const std::vector<Fed>& fed);

  Session& session_;
  const Geometry& geometry_;
  Limits limits_;
  const OnToken& on_token_;
  std::vector<Request*> rows_;
};

}  // namespace chai
