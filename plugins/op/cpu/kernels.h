// The tasks that the kernels of one instruction set evaluate, and the functions on rows that they are made
// of.
//
// Pointers to activations are to elements of T; strides count elements. "Scores" are in log2 units: the
// factor scale * log2(e) is applied to the query.
#pragma once

#include <cstddef>
#include <cstdint>

#include "chai/attention.h"
#include "chai/softmax_state.h"
#include "op/cpu/rows.h"

namespace chai {

// Activations of one type T.
struct ElementKernels {
  std::int64_t size;  // bytes
  void (*widen)(float* to, const void* from, std::int64_t n, float factor);
  void (*narrow)(void* to, const float* from, std::int64_t n, float factor);
};

// Several vectors that meet the same rows. `item(i)` starts i strides behind `first`.
struct Queries {
  const float* first;
  std::int64_t count, stride;
};

// Cache rows of one storage. `group` is the number of elements that share a scale, `scratch` holds at least
// row_scratch() floats.
struct RowKernels {
  // scores[q * score_stride + t] = queries[q] · row t
  void (*dots)(const Queries& queries, const RowBlock& block, std::int64_t dim, std::int64_t group,
               float* scores, std::int64_t score_stride, float* scratch);
  // sums[i] += Σ_t weights[i][t] · row t, for each of `count` heads
  void (*add)(float* const* sums, const float* const* weights, std::int64_t count, const RowBlock& block,
              std::int64_t dim, std::int64_t group, float* scratch);
  // The rows as floats, [count][dim].
  void (*load)(float* to, const RowBlock& block, std::int64_t dim, std::int64_t group);
  // Floats [count][dim] to rows.
  void (*store)(const RowBlock& block, const float* from, std::int64_t dim, std::int64_t group);
  std::size_t (*scratch)(std::int64_t dim, std::int64_t group);
};

// What all tasks of a call have in common.
struct Common {
  const ElementKernels* element;
  const RowKernels* keys;
  const RowKernels* values;
  std::int64_t key_dim, value_dim, group, output_stride;
  std::int64_t window;  // 0: none
  float scale;          // log2 units
  float softcap;        // log2 units; 0: none
};

// Where the attended values of one query head of a row go, token by token from the row's first one that is
// computed by its representative: normalised into the output, or, when the keys of the row are split among
// tasks, unnormalised into their parts.
struct Target {
  void* output = nullptr;         // token i at output + i * output_stride
  float* partial = nullptr;       // entry e at partial + e * value_dim; null: write the output
  SoftmaxState* state = nullptr;  // entry e at state[e]; e = part * (tokens of the row) + token
  float sink = -HUGE_VALF;        // a logit in the denominator, log2 units
};

// Exact attention of one head over the first tokens of a fresh row, and its quantised probabilities.
struct ProbeTask {
  const Common* common;
  const void* query;  // [tokens][key_dim], this head
  const void* key;    // [tokens][key_dim], its KV head
  const void* value;  // [tokens][value_dim]
  std::int64_t tokens;
  float scale, softcap, sink, slope;  // natural units
  void* output;
  std::int32_t* quantised;  // [tokens * (tokens + 1) / 2]
};

// A few tokens over a range of a long cache: each key and value row is read once. A component is a set of KV
// heads and K slots that share no head map entry with the rest of the row.
struct StreamTask {
  struct Slot {
    PagedRows keys;
    std::int32_t first_query, num_queries;
  };
  struct Query {
    const void* values;  // of the representative: [tokens][key_dim]
    float slope;         // log2 units a position
  };
  struct Value {
    PagedRows values;
    std::int32_t first_head, num_heads;
  };
  struct Head {
    std::int32_t query;  // index of its representative
    Target target;
  };
  const Common* common;
  const Slot* slots;
  std::int64_t num_slots;
  const Query* queries;  // slot by slot
  std::int64_t num_queries;
  const Value* values;
  std::int64_t num_values;
  const Head* heads;
  std::int64_t tokens;  // token i sees positions up to position + i
  std::int64_t position;
  std::int64_t begin, end;   // the range of positions
  std::int64_t part_offset;  // entry of token 0 in the targets' parts
};

// A block of queries of one representative over a range of the cache, for all value heads of its cluster.
struct TileTask {
  struct Head {
    PagedRows values;
    Target target;
  };
  const Common* common;
  const void* query;  // [tokens][key_dim]
  float slope;        // log2 units a position
  PagedRows keys;
  const Head* heads;
  std::int64_t num_heads;
  std::int64_t tokens;  // at most kMaxTileTokens; token i sees positions up to position + i
  std::int64_t position;
  std::int64_t begin, end;
  std::int64_t first;        // the target's token that is token 0 here
  std::int64_t part_offset;  // entry of the target's token 0 in its parts
};

// The parts of one query head's tokens become its output. Parts that a token does not see are empty.
struct MergeTask {
  const Common* common;
  Target target;
  std::int64_t tokens, parts;
};

// New rows of one head on their way into the cache.
struct AppendTask {
  const ElementKernels* element;
  const RowKernels* rows;
  const void* from;  // [count][dim] of T
  PagedRows to;
  std::int64_t position, count, dim, group;
};

constexpr std::int64_t kMaxTileTokens = 192;

// Scratch is aligned to 64 bytes and holds at least the floats that the function beside the kernel names.
struct Kernels {
  void (*probe)(const ProbeTask& task, float* scratch);
  std::size_t (*probe_scratch)(const ProbeTask& task);
  void (*append)(const AppendTask& task, float* scratch);
  std::size_t (*append_scratch)(const AppendTask& task);
  void (*stream)(const StreamTask& task, float* scratch);
  std::size_t (*stream_scratch)(const StreamTask& task);
  void (*tile)(const TileTask& task, float* scratch);
  std::size_t (*tile_scratch)(const TileTask& task);
  void (*merge)(const MergeTask& task, float* scratch);
  std::size_t (*merge_scratch)(const MergeTask& task);
  const ElementKernels* (*element)(Storage storage);
  const RowKernels* (*rows)(Storage storage);
};

const Kernels& kernels(Isa isa);

// attend() with given kernels.
void attend(const AttentionCall& call, const Kernels& kernel, const Executor& executor);

namespace portable {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace chai
