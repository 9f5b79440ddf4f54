// How the attention of a call's rows is cut into tasks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "chai/attention.h"
#include "op/cpu/call_rows.h"
#include "op/cpu/kernels.h"

namespace chai {

class Plan {
 public:
  // The caches must hold the new rows before a task runs. The plan points into the call's tensors and
  // `common`.
  Plan(const AttentionCall& call, const Common& common, const std::vector<Row>& rows, std::size_t threads);
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
    std::vector<StreamTask::Query> queries;
    std::vector<StreamTask::Value> values;
    std::vector<StreamTask::Head> heads;
  };

  // Positions [first, end) of a row in parts of part_length.
  struct Range {
    std::int64_t first, end, part_length;

    std::int64_t parts() const { return (end - first + part_length - 1) / part_length; }
  };

  void plan_streams(const Row& row, std::int64_t bytes_per_task);
  void plan_tiles(const Row& row, std::int64_t wanted_tasks);
  std::deque<Component> components(const Row& row) const;
  Target target(const Row& row, std::int64_t head) const;
  void split(const Row& row, Target* target, std::int64_t parts);
  const void* query(const Row& row, std::int64_t head, std::int64_t token) const;
  float slope(std::int64_t head) const;
  std::int64_t position_bytes(std::int64_t slots, std::int64_t values) const;

  const AttentionCall& call_;
  const AttentionShape& shape_;
  const Common& common_;
  std::vector<StreamTask> streams_;
  std::vector<TileTask> tiles_;
  std::vector<MergeTask> merges_;
  std::deque<Component> components_;
  std::deque<std::vector<TileTask::Head>> tile_heads_;
  std::vector<std::unique_ptr<float[]>> memory_;
};

}  // namespace chai
