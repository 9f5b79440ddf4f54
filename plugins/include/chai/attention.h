// chai::ClusteredHeadAttention and chai::SharedClusteredHeadAttention on the CPU: the problem, its checks and
// its evaluation.
//
// No framework appears here. The caller owns all memory and lends a way to run tasks in parallel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace chai {

// How rows are stored. Activations (T) are one of the first three; caches may be any. 8 and 4 bits have
// scales in float16 beside them, two codes of 4 bits share a byte.
enum class Storage { kFloat32, kFloat16, kBfloat16, kInt8, kInt4 };

inline bool quantised(Storage storage) {
  return storage == Storage::kInt8 || storage == Storage::kInt4;
}

// Bytes of a row of `dim` elements, without its scales.
inline std::int64_t row_bytes(Storage storage, std::int64_t dim) {
  switch (storage) {
    case Storage::kFloat32:
      return 4 * dim;
    case Storage::kInt8:
      return dim;
    case Storage::kInt4:
      return dim / 2;
    default:
      return 2 * dim;
  }
}

// float16 numbers beside a row: scales, then the minima of 4 bits.
inline std::int64_t row_scales(Storage storage, std::int64_t dim, std::int64_t group) {
  return quantised(storage) ? dim / group * (storage == Storage::kInt4 ? 2 : 1) : 0;
}

// Instruction sets the kernels are compiled for; the widest that the processor has is chosen at run time.
enum class Isa { kPortable, kAvx2, kAvx512 };

struct AttentionShape {
  std::int64_t batch = 0;      // B
  std::int64_t tokens = 0;     // S, new tokens, right padded
  std::int64_t heads = 0;      // H, query heads
  std::int64_t kv_heads = 0;   // G
  std::int64_t kept = 0;       // R, slots of the K cache
  std::int64_t pages = 0;      // N, in the pool
  std::int64_t page_size = 0;  // L, positions
  std::int64_t entries = 0;    // M, pages that a row may have
  std::int64_t key_dim = 0;    // D
  std::int64_t value_dim = 0;  // Dv

  std::int64_t capacity() const { return page_size * entries; }  // C, positions of a row
};

// The cache of keys or of values: a pool [N][heads][L] of rows and their scales. `present` may equal `past`
// (in place), otherwise the past is copied. Of the shared op, `past` is null and `present` only read.
struct Pool {
  Storage storage = Storage::kFloat32;
  const void* past = nullptr;
  void* present = nullptr;
  const void* past_scales = nullptr;  // float16; null unless quantised
  void* present_scales = nullptr;
};

// One evaluation. Tensors are contiguous, in the layout of the op.
//
// A call with a kept_head_map is one of the shared op: the pools and kept_head_map are what the producer
// gave.
struct AttentionCall {
  AttentionShape shape;
  Storage storage = Storage::kFloat32;  // T
  float scale = 0.0f;                   // 0: 1/sqrt(D)
  std::int64_t probe_tokens = 5;
  bool online = true;
  std::int64_t group = 32;  // elements that share a scale
  std::int64_t window = 0;  // 0: none
  float softcap = 0.0f;     // 0: none

  const void* query = nullptr;                  // [B,H,S,D]
  const void* key = nullptr;                    // [B,G,S,D]
  const void* value = nullptr;                  // [B,G,S,Dv]
  Pool keys;                                    // heads = R
  Pool values;                                  // heads = G
  const std::int32_t* page_table = nullptr;     // [B,M]
  const std::int32_t* past_head_map = nullptr;  // [B,H]
  const std::int32_t* past_lengths = nullptr;   // [B]
  const std::int32_t* lengths = nullptr;        // [B]
  const void* sinks = nullptr;                  // T [H], or null
  const float* slopes = nullptr;                // [H], or null
  void* output = nullptr;                       // [B,S,H*Dv]
  std::int32_t* present_head_map = nullptr;     // [B,H]

  const std::int32_t* kept_head_map = nullptr;  // [B,H]

  bool shared() const { return kept_head_map != nullptr; }
  // The map that names the kept KV heads of a row, before a fresh row has decided its own.
  const std::int32_t* kept_map(std::int64_t row) const {
    return (shared() ? kept_head_map : past_head_map) + row * shape.heads;
  }
  // The first position that a token at `position` sees.
  std::int64_t first_visible(std::int64_t position) const {
    return window > 0 && position >= window ? position - window + 1 : 0;
  }
};

// Runs task(data, i) for i in [0, count), in any order and on any threads, and returns when all are done.
struct Executor {
  void* context = nullptr;
  void (*run)(void* context, std::size_t count, void (*task)(void* data, std::size_t index),
              void* data) = nullptr;
  // How many threads the work is cut for. A guess is fine: it decides sizes, not results.
  std::size_t threads = 1;
};

// Why the call cannot be made, or an empty string. Reads shapes, lengths, tables and maps; writes nothing.
std::string check(const AttentionCall& call);

// Evaluates a call that check() accepts. Throws std::bad_alloc when scratch memory cannot be had.
void attend(const AttentionCall& call, Isa isa, const Executor& executor);

// The instruction set to use: the widest available, or the one that the environment variable CHAI_ISA names
// (portable, avx2, avx512). Returns false, with the reason, when that one is unknown or not available.
bool choose_isa(Isa* isa, std::string* error);
bool available(Isa isa);
const char* name(Isa isa);

}  // namespace chai
