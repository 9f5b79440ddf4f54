// How one call is cut into tasks: per active row its head map and slots, and the tasks that attend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "chai/attention.h"
#include "chai/head_map.h"
#include "kernels.h"

namespace chai {

inline std::int64_t element_size(Storage storage) {
  return storage == Storage::kFloat32 ? 4 : 2;
}

// Start of a [position][dim] matrix inside a contiguous tensor [batch][heads][positions][dim].
template <typename Byte>
Byte* matrix(Byte* tensor, std::int64_t index, std::int64_t positions, std::int64_t row_bytes) {
  return tensor + index * positions * row_bytes;
}

// One active row (lengths > 0).
struct Row {
  std::int64_t index = 0;       // b
  std::int64_t past = 0;        // n
  std::int64_t new_tokens = 0;  // m
  bool fresh = false;
  std::int64_t exact = 0;  // the first tokens, which the probe computes
  std::vector<std::int32_t> head_map;
  Slots slots;

  std::int64_t tokens() const { return new_tokens - exact; }  // computed by representative
  std::int64_t position() const { return past + exact; }      // of the first of them
  std::int64_t end() const { return past + new_tokens; }
};

class Plan {
 public:
  // The caches must hold the new rows before a task runs. The plan points into the call's tensors.
  Plan(const AttentionCall& call, const std::vector<Row>& rows, std::size_t threads);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  const std::vector<StreamTask>& streams() const { return streams_; }
  const std::vector<TileTask>& tiles() const { return tiles_; }
  const std::vector<MergeTask>& merges() const { return merges_; }

 private:
  // KV heads and slots that share no head map entry with the others of their row, in StreamTask's terms.
  struct Component {
    std::vector<std::int64_t> kv_heads;
    std::vector<StreamTask::Slot> slots;
    std::vector<const void*> queries;
    std::vector<StreamTask::Value> values;
    std::vector<StreamTask::Head> heads;
    std::vector<std::int64_t> head_indices;
  };

  void plan_streams(const Row& row, std::int64_t bytes_per_task);
  void plan_tiles(const Row& row, std::int64_t wanted_tasks);
  std::deque<Component> components(const Row& row) const;
  Target target(const Row& row, std::int64_t head) const;
  void split(const Row& row, Target* target, std::int64_t parts, std::int64_t part_length);
  const void* slot_keys(const Row& row, std::int64_t kv_head) const;
  const void* query(const Row& row, std::int64_t head, std::int64_t token) const;
  const void* values(const Row& row, std::int64_t kv_head) const;

  const AttentionCall& call_;
  const AttentionShape& shape_;
  std::int64_t element_;
  float log2_scale_;
  std::vector<StreamTask> streams_;
  std::vector<TileTask> tiles_;
  std::vector<MergeTask> merges_;
  std::deque<Component> components_;
  std::deque<std::vector<TileTask::Head>> tile_heads_;
  std::vector<std::unique_ptr<float[]>> memory_;
};

// Natural-unit factor on the scores of a call.
float score_scale(const AttentionCall& call);

}  // namespace chai
