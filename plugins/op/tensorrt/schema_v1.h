// The signature of version 1 of the op, for the plugin of that version: it goes with it.
#pragma once

#include "chai/op_schema.h"

// clang-format off
namespace chai::schema {

namespace clustered_head_attention_v1 {

inline constexpr char kOpType[] = "ClusteredHeadAttention";
inline constexpr std::int64_t kVersion = 1;

// Inputs by position.
inline constexpr std::size_t kQuery = 0;
inline constexpr std::size_t kKey = 1;
inline constexpr std::size_t kValue = 2;
inline constexpr std::size_t kPastKey = 3;
inline constexpr std::size_t kPastValue = 4;
inline constexpr std::size_t kPastHeadMap = 5;
inline constexpr std::size_t kPastLengths = 6;
inline constexpr std::size_t kLengths = 7;

inline constexpr Parameter kInputs[] = {
    {"query", Type::T, 4, false},  // [B,H,S,D]
    {"key", Type::T, 4, false},  // [B,G,S,D]
    {"value", Type::T, 4, false},  // [B,G,S,Dv]
    {"past_key", Type::T, 4, false},  // [B,R,C,D]
    {"past_value", Type::T, 4, false},  // [B,G,C,Dv]
    {"past_head_map", Type::M, 2, false},  // [B,H]
    {"past_lengths", Type::M, 1, false},  // [B]
    {"lengths", Type::M, 1, false},  // [B]
};

// Outputs by position.
inline constexpr std::size_t kOutput = 0;
inline constexpr std::size_t kPresentKey = 1;
inline constexpr std::size_t kPresentValue = 2;
inline constexpr std::size_t kPresentHeadMap = 3;

inline constexpr Parameter kOutputs[] = {
    {"output", Type::T, 3, false},  // [B,S,H*Dv]
    {"present_key", Type::T, 4, false},  // [B,R,C,D]
    {"present_value", Type::T, 4, false},  // [B,G,C,Dv]
    {"present_head_map", Type::M, 2, false},  // [B,H]
};

struct Attributes {
  float scale = 0.0F;
  std::int64_t probe_tokens = 5;
  std::int64_t online = 1;
};

inline constexpr const char* kAttributeNames[] = {
    "scale",
    "probe_tokens",
    "online",
};

}  // namespace clustered_head_attention_v1

}  // namespace chai::schema
// clang-format on
