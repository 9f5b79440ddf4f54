// Generated from chai_export/op/schema.py by `python -m chai_export.op.cpp_header`: do not edit.
// The ops of domain "chai" as every implementation sees them; docs/op.md says what they mean.
#pragma once

#include <cstddef>
#include <cstdint>

// clang-format off
namespace chai::schema {

inline constexpr char kDomain[] = "chai";

// Of both ops.
inline constexpr std::int64_t kVersion = 2;

// Type variables: T activations, M maps and lengths, K and V storage of keys and values, F scales, A slopes.
enum class Type { T, M, K, V, F, A };

struct Parameter {
  const char* name;
  Type type;
  std::size_t rank;
  bool optional;
};

namespace clustered_head_attention {

inline constexpr char kOpType[] = "ClusteredHeadAttention";

// Inputs by position.
inline constexpr std::size_t kQuery = 0;
inline constexpr std::size_t kKey = 1;
inline constexpr std::size_t kValue = 2;
inline constexpr std::size_t kKeyCache = 3;
inline constexpr std::size_t kValueCache = 4;
inline constexpr std::size_t kKeyScales = 5;
inline constexpr std::size_t kValueScales = 6;
inline constexpr std::size_t kPageTable = 7;
inline constexpr std::size_t kPastHeadMap = 8;
inline constexpr std::size_t kPastLengths = 9;
inline constexpr std::size_t kLengths = 10;
inline constexpr std::size_t kSinks = 11;
inline constexpr std::size_t kAlibiSlopes = 12;

inline constexpr Parameter kInputs[] = {
    {"query", Type::T, 4, false},  // [B,H,S,D]
    {"key", Type::T, 4, false},  // [B,G,S,D]
    {"value", Type::T, 4, false},  // [B,G,S,Dv]
    {"key_cache", Type::K, 4, false},  // [N,R,L,Dk]
    {"value_cache", Type::V, 4, false},  // [N,G,L,Dw]
    {"key_scales", Type::F, 4, true},  // [N,R,L,Sk]
    {"value_scales", Type::F, 4, true},  // [N,G,L,Sv]
    {"page_table", Type::M, 2, false},  // [B,M]
    {"past_head_map", Type::M, 2, false},  // [B,H]
    {"past_lengths", Type::M, 1, false},  // [B]
    {"lengths", Type::M, 1, false},  // [B]
    {"sinks", Type::T, 1, true},  // [H]
    {"alibi_slopes", Type::A, 1, true},  // [H]
};

// Outputs by position.
inline constexpr std::size_t kOutput = 0;
inline constexpr std::size_t kPresentKeyCache = 1;
inline constexpr std::size_t kPresentValueCache = 2;
inline constexpr std::size_t kPresentKeyScales = 3;
inline constexpr std::size_t kPresentValueScales = 4;
inline constexpr std::size_t kPresentHeadMap = 5;

inline constexpr Parameter kOutputs[] = {
    {"output", Type::T, 3, false},  // [B,S,H*Dv]
    {"present_key_cache", Type::K, 4, false},  // [N,R,L,Dk]
    {"present_value_cache", Type::V, 4, false},  // [N,G,L,Dw]
    {"present_key_scales", Type::F, 4, true},  // [N,R,L,Sk]
    {"present_value_scales", Type::F, 4, true},  // [N,G,L,Sv]
    {"present_head_map", Type::M, 2, false},  // [B,H]
};

struct Attributes {
  float scale = 0.0F;
  std::int64_t probe_tokens = 5;
  std::int64_t online = 1;
  std::int64_t key_bits = 0;
  std::int64_t value_bits = 0;
  std::int64_t group = 32;
  std::int64_t window = 0;
  float softcap = 0.0F;
};

inline constexpr const char* kAttributeNames[] = {
    "scale",
    "probe_tokens",
    "online",
    "key_bits",
    "value_bits",
    "group",
    "window",
    "softcap",
};

}  // namespace clustered_head_attention

namespace shared_clustered_head_attention {

inline constexpr char kOpType[] = "SharedClusteredHeadAttention";

// Inputs by position.
inline constexpr std::size_t kQuery = 0;
inline constexpr std::size_t kKey = 1;
inline constexpr std::size_t kValue = 2;
inline constexpr std::size_t kKeyCache = 3;
inline constexpr std::size_t kValueCache = 4;
inline constexpr std::size_t kKeyScales = 5;
inline constexpr std::size_t kValueScales = 6;
inline constexpr std::size_t kPageTable = 7;
inline constexpr std::size_t kKeptHeadMap = 8;
inline constexpr std::size_t kPastHeadMap = 9;
inline constexpr std::size_t kPastLengths = 10;
inline constexpr std::size_t kLengths = 11;
inline constexpr std::size_t kSinks = 12;
inline constexpr std::size_t kAlibiSlopes = 13;

inline constexpr Parameter kInputs[] = {
    {"query", Type::T, 4, false},  // [B,H,S,D]
    {"key", Type::T, 4, false},  // [B,G,S,D]
    {"value", Type::T, 4, false},  // [B,G,S,Dv]
    {"key_cache", Type::K, 4, false},  // [N,R,L,Dk]
    {"value_cache", Type::V, 4, false},  // [N,G,L,Dw]
    {"key_scales", Type::F, 4, true},  // [N,R,L,Sk]
    {"value_scales", Type::F, 4, true},  // [N,G,L,Sv]
    {"page_table", Type::M, 2, false},  // [B,M]
    {"kept_head_map", Type::M, 2, false},  // [B,H]
    {"past_head_map", Type::M, 2, false},  // [B,H]
    {"past_lengths", Type::M, 1, false},  // [B]
    {"lengths", Type::M, 1, false},  // [B]
    {"sinks", Type::T, 1, true},  // [H]
    {"alibi_slopes", Type::A, 1, true},  // [H]
};

// Outputs by position.
inline constexpr std::size_t kOutput = 0;
inline constexpr std::size_t kPresentHeadMap = 1;

inline constexpr Parameter kOutputs[] = {
    {"output", Type::T, 3, false},  // [B,S,H*Dv]
    {"present_head_map", Type::M, 2, false},  // [B,H]
};

struct Attributes {
  float scale = 0.0F;
  std::int64_t probe_tokens = 5;
  std::int64_t online = 1;
  std::int64_t key_bits = 0;
  std::int64_t value_bits = 0;
  std::int64_t group = 32;
  std::int64_t window = 0;
  float softcap = 0.0F;
};

inline constexpr const char* kAttributeNames[] = {
    "scale",
    "probe_tokens",
    "online",
    "key_bits",
    "value_bits",
    "group",
    "window",
    "softcap",
};

}  // namespace shared_clustered_head_attention

}  // namespace chai::schema
// clang-format on
