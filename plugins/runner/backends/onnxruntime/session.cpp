#include "runner/backends/onnxruntime/session.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "runner/graph_names.h"

namespace chai {

OnnxRuntimeSession::OnnxRuntimeSession(Ort::Env& environment, const std::string& bundle,
                                       const Manifest& manifest, const Options& options,
                                       const std::string& op_library, Settings settings)
    : settings_(std::move(settings)),
      cache_memory_(options.cache_memory),
      geometry_(manifest.geometry),
      tensors_(cache_tensors(manifest, options.heads)),
      in_place_(!op_library.empty()),
      model_(environment, bundle, manifest, options, op_library),
      pool_(0, settings_.page_length) {}

Session::Room OnnxRuntimeSession::room() const {
  Budget budget = budget_of(cache_memory_, settings_.available_memory());
  const std::int64_t pages = budget.size / (static_cast<std::int64_t>(sets()) * page_bytes());
  return {pages * settings_.page_length, std::move(budget)};
}

void OnnxRuntimeSession::drop() {
  bindings_.clear();
  caches_.clear();
  pool_ = PagePool(0, settings_.page_length);
  longest_ = allocated_ = 0;
  maps_ = RowMaps();
}

void OnnxRuntimeSession::start(std::int64_t rows, std::int64_t pages) {
  drop();
  pool_ = PagePool(pages, settings_.page_length);
  maps_ = RowMaps(geometry_.num_layers, rows, geometry_.num_query_heads);
  allocate(in_place_ ? pages : std::min(pages, rows));
}

bool OnnxRuntimeSession::promise(std::int64_t row, std::int64_t tokens) {
  const std::int64_t pages = static_cast<std::int64_t>(sets()) * pool_.untouched_after(row, tokens);
  if (pages * page_bytes() > settings_.available_memory()) return false;
  if (!pool_.promise(row, tokens)) return false;
  longest_ = std::max(longest_, tokens);
  return true;
}

void OnnxRuntimeSession::allocate(std::int64_t pages) {
  allocated_ = pages;
  turn_ = 0;
  for (std::size_t set = 0; set < sets(); ++set) {
    caches_.emplace_back();
    for (const CacheTensor& tensor : tensors_)
      caches_.back().emplace_back(
          static_cast<std::size_t>(pages * settings_.page_length * tensor.bytes_per_token()));
  }
  for (std::size_t turn = 0; turn < sets(); ++turn) {
    Ort::IoBinding binding(model_.session());
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      const CacheTensor& tensor = tensors_[i];
      const auto value = [&](const Caches& caches) {
        return model_.value(tensor.type, caches[i].data(), caches[i].bytes(),
                            {pages, tensor.heads, settings_.page_length, tensor.columns});
      };
      binding.BindInput((graph::kPast + tensor.name).c_str(), value(caches_[turn]));
      binding.BindOutput((graph::kPresent + tensor.name).c_str(), value(caches_[(turn + 1) % sets()]));
    }
    bindings_.push_back(std::move(binding));
  }
}

// Larger buffers with the pages that there are; the function body copies all of them in every call anyway.
void OnnxRuntimeSession::grow(std::int64_t pages) {
  bindings_.clear();
  const Caches past = std::move(caches_[turn_]);
  caches_.clear();  // the other set's memory is given back first
  allocate(pages);
  for (std::size_t i = 0; i < past.size(); ++i)
    std::memcpy(caches_[0][i].data(), past[i].data(), past[i].bytes());
}

const std::vector<float>& OnnxRuntimeSession::step(const Step& step, const std::vector<std::int64_t>& rows) {
  for (std::size_t line = 0; line < rows.size(); ++line)
    pool_.extend(rows[line], std::int64_t{step.past_lengths[line]} + step.lengths[line]);
  if (pool_.touched() > allocated_)  // of the function body only
    grow(std::min(pool_.pages(), std::max(pool_.touched(), 2 * allocated_)));
  try {
    run(step, rows);
  } catch (const Ort::Exception& error) {
    throw std::runtime_error(std::string("ONNX Runtime could not run a step: ") + error.what());
  }
  turn_ = (turn_ + 1) % sets();
  return logits_.read();
}

void OnnxRuntimeSession::run(const Step& step, const std::vector<std::int64_t>& rows) {
  const auto batch = static_cast<std::int64_t>(rows.size());
  const std::int64_t tokens = static_cast<std::int64_t>(step.input_ids.size()) / batch;
  const std::vector<std::int32_t> table = pool_.table(rows);
  const std::vector<std::int32_t> past_maps = maps_.of(rows);
  std::vector<std::int32_t> maps(past_maps.size());
  const std::vector<std::int64_t> map_shape{geometry_.num_layers, batch, geometry_.num_query_heads};
  Ort::IoBinding& binding = bindings_[turn_];
  binding.BindInput(graph::kInputIds, model_.value(step.input_ids, {batch, tokens}));
  binding.BindInput(graph::kLengths, model_.value(step.lengths, {batch}));
  binding.BindInput(graph::kPastLengths, model_.value(step.past_lengths, {batch}));
  binding.BindInput(graph::kOutputPositions, model_.value(step.output_positions, {batch, 1}));
  for (const std::int64_t window : geometry_.cache_windows())
    binding.BindInput(graph::page_table(window).c_str(),
                      model_.value(table, {batch, pool_.most_pages(rows)}));
  binding.BindInput(graph::kHeadMap, model_.value(past_maps, map_shape));
  binding.BindOutput(graph::kPresentHeadMap, model_.value(maps, map_shape));
  logits_.bind(binding, model_, batch, geometry_.vocab_size);
  model_.session().Run(Ort::RunOptions(), binding);
  maps_.keep(rows, maps.data());
}

}  // namespace chai
