// The stage that puts a call's new rows into the caches.
#pragma once

#include <vector>

#include "chai/attention.h"
#include "op/cpu/call_rows.h"
#include "op/cpu/kernels.h"
#include "op/cpu/stages.h"

namespace chai {

// Copies the pools unless they are updated in place, then writes the new rows of every active row.
void append(const AttentionCall& call, const Kernels& kernel, const Executor& executor,
            const std::vector<Row>& rows);

}  // namespace chai
