// The generation loop of version 1 of the op: requests share the rows of one batch, each in its own phase. A
// row is prefilled in chunks, then decoded; when its text ends the next waiting prompt takes it.
#pragma once

#include <cstdint>
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

  // Generates until every request has ended, on at most `slots` rows.
  void run(std::vector<Request>& requests, std::size_t slots);

 private:
  std::int64_t capacity_for(const std::vector<Request>& requests) const;
  void step();
  void make_room(std::int64_t needed);

  Session& session_;
  const Geometry& geometry_;
  Limits limits_;
  const OnToken& on_token_;
  std::vector<Request*> rows_;
};

}  // namespace chai
