// chai::ClusteredHeadAttention and chai::SharedClusteredHeadAttention, version 1, on the CPU: the problem,
// its checks and its evaluation.
//
// No framework appears here. The caller owns all memory and lends a way to run tasks in parallel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace chai {

enum class Storage { kFloat32, kFloat16, kBfloat16 };

// Instruction sets the kernels are compiled for; the widest that the processor has is chosen at run time.
enum class Isa { kPortable, kAvx2, kAvx512 };

struct AttentionShape {
  std::int64_t batch = 0;      // B
  std::int64_t tokens = 0;     // S, new tokens, right padded
  std::int64_t heads = 0;      // H, query heads
  std::int64_t kv_heads = 0;   // G
  std::int64_t kept = 0;       // R, slots of the K cache
  std::int64_t capacity = 0;   // C
  std::int64_t key_dim = 0;    // D
  std::int64_t value_dim = 0;  // Dv
};

// One evaluation. Tensors are contiguous, in the layout of the op; present_key may equal past_key and
// present_value past_value (in place), otherwise the past is copied.
//
// A call with a kept_head_map is one of the shared op: present_key, present_value and kept_head_map are what
// the producer gave and are only read; value, past_key and past_value are null.
struct AttentionCall {
  AttentionShape shape;
  Storage storage = Storage::kFloat32;
  float scale = 0.0f;  // 0: 1/sqrt(D)
  std::int64_t probe_tokens = 5;
  bool online = true;

  const void* query = nullptr;                  // [B,H,S,D]
  const void* key = nullptr;                    // [B,G,S,D]
  const void* value = nullptr;                  // [B,G,S,Dv]
  const void* past_key = nullptr;               // [B,R,C,D]
  const void* past_value = nullptr;             // [B,G,C,Dv]
  const std::int32_t* past_head_map = nullptr;  // [B,H]
  const std::int32_t* past_lengths = nullptr;   // [B]
  const std::int32_t* lengths = nullptr;        // [B]
  void* output = nullptr;                       // [B,S,H*Dv]
  void* present_key = nullptr;                  // [B,R,C,D]
  void* present_value = nullptr;                // [B,G,C,Dv]
  std::int32_t* present_head_map = nullptr;     // [B,H]

  const std::int32_t* kept_head_map = nullptr;  // [B,H]

  bool shared() const { return kept_head_map != nullptr; }
  // The map that names the kept KV heads of a row, before a fresh row has decided its own.
  const std::int32_t* kept_map(std::int64_t row) const {
    return (shared() ? kept_head_map : past_head_map) + row * shape.heads;
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

// Why the call cannot be made, or an empty string. Reads shapes, lengths and maps; writes nothing.
std::string check(const AttentionCall& call);

// Evaluates a call that check() accepts. Throws std::bad_alloc when scratch memory cannot be had.
void attend(const AttentionCall& call, Isa isa, const Executor& executor);

// The instruction set to use: the widest available, or the one that the environment variable CHAI_ISA names
// (portable, avx2, avx512). Returns false, with the reason, when that one is unknown or not available.
bool choose_isa(Isa* isa, std::string* error);
bool available(Isa isa);
const char* name(Isa isa);

}  // namespace chai
