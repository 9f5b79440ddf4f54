// The tasks that the kernels of one instruction set and storage type evaluate, type-erased.
//
// Pointers to tensors are to elements of the storage type; strides count elements. "Scores" are in log2
// units: the factor scale * log2(e) is applied to the query.
#pragma once

#include <cstddef>
#include <cstdint>

#include "chai/attention.h"
#include "chai/softmax_state.h"

namespace chai {

// Where the attended values of one query head of a row go, token by token from the row's first one that is
// computed by its representative: normalised into the output, or, when the keys of the row are split among
// tasks, unnormalised into their parts.
struct Target {
  void* output = nullptr;         // token i at output + i * output_stride
  float* partial = nullptr;       // entry e at partial + e * value_dim; null: write the output
  SoftmaxState* state = nullptr;  // entry e at state[e]; e = part * (tokens of the row) + token
};

// Exact attention of one head over the first tokens of a fresh row, and its quantised probabilities.
struct ProbeTask {
  const void* query;  // [tokens][key_dim], this head
  const void* key;    // [tokens][key_dim], its KV head
  const void* value;  // [tokens][value_dim]
  std::int64_t tokens, key_dim, value_dim;
  float scale;  // natural units
  void* output;
  std::int64_t output_stride;
  std::int32_t* quantised;  // [tokens * (tokens + 1) / 2]
};

// A few tokens over a range of a long cache: each key and value row is read once. A component is a set of KV
// heads and K slots that share no head map entry with the rest of the row.
struct StreamTask {
  struct Slot {
    const void* keys;  // [capacity][key_dim]
    std::int32_t first_query, num_queries;
  };
  struct Value {
    const void* values;  // [capacity][value_dim]
    std::int32_t first_head, num_heads;
  };
  struct Head {
    std::int32_t query;  // index of its representative
    Target target;
  };
  const Slot* slots;
  std::int64_t num_slots;
  const void* const* queries;  // of the representatives, slot by slot: [tokens][key_dim]
  std::int64_t num_queries;
  const Value* values;
  std::int64_t num_values;
  const Head* heads;
  std::int64_t tokens;  // token i sees positions 0 … position + i
  std::int64_t position;
  std::int64_t begin, end;   // the range of positions
  std::int64_t part_offset;  // entry of token 0 in the targets' parts
  std::int64_t key_dim, value_dim, output_stride;
  float scale;  // log2 units
};

// A block of queries of one representative over a range of the cache, for all value heads of its cluster.
struct TileTask {
  struct Head {
    const void* values;  // [capacity][value_dim]
    Target target;
  };
  const void* query;  // [tokens][key_dim]
  const void* keys;   // [capacity][key_dim]
  const Head* heads;
  std::int64_t num_heads;
  std::int64_t tokens;  // at most kMaxTileTokens; token i sees positions 0 … position + i
  std::int64_t position;
  std::int64_t begin, end;
  std::int64_t first;        // the target's token that is token 0 here
  std::int64_t part_offset;  // entry of the target's token 0 in its parts
  std::int64_t key_dim, value_dim, output_stride;
  float scale;  // log2 units
};

// The parts of one query head's tokens become its output.
struct MergeTask {
  Target target;
  std::int64_t tokens;
  std::int64_t position;  // token i sees positions 0 … position + i, so parts that begin later do not count
  std::int64_t part_length;  // positions
  std::int64_t value_dim, output_stride;
};

constexpr std::int64_t kMaxTileTokens = 192;

// Scratch is aligned to 64 bytes and holds at least the floats that the function beside the kernel names.
struct Kernels {
  void (*probe)(const ProbeTask& task, float* scratch);
  std::size_t (*probe_scratch)(const ProbeTask& task);
  void (*stream)(const StreamTask& task, float* scratch);
  std::size_t (*stream_scratch)(const StreamTask& task);
  void (*tile)(const TileTask& task, float* scratch);
  std::size_t (*tile_scratch)(const TileTask& task);
  void (*merge)(const MergeTask& task, float* scratch);
  std::size_t (*merge_scratch)(const MergeTask& task);
};

const Kernels& kernels(Isa isa, Storage storage);

// attend() with given kernels.
void attend(const AttentionCall& call, const Kernels& kernel, const Executor& executor);

namespace portable {
const Kernels& kernels(Storage storage);
}
namespace avx2 {
const Kernels& kernels(Storage storage);
}
namespace avx512 {
const Kernels& kernels(Storage storage);
}

}  // namespace chai
