#include "chai/runner.h"

#include <algorithm>
#include <random>
#include <utility>

#include "runner/backends.h"
#include "runner/manifest.h"
#include "runner/sampler.h"
#include "runner/scheduler.h"
#include "support/error.h"

namespace chai {
namespace {

constexpr std::int64_t kDefaultMaxBatch = 8;
constexpr std::int64_t kMostTokens = std::int64_t{1} << 30;
constexpr std::int64_t kDefaultTopK = 50;

struct PositionLimit {
  std::int64_t tokens;
  std::string hint;
};

PositionLimit position_limit(const Manifest& manifest, const EngineRecord* engine, Session& session,
                             std::int64_t max_seq) {
  require(max_seq >= 0, "max_seq is negative; give 1 or more, or 0 for what the model allows");
  PositionLimit limit{kMostTokens, "shorten it"};
  const auto bound = [&](std::int64_t tokens, const std::string& hint) {
    if (tokens < limit.tokens) limit = {tokens, hint};
  };
  session.drop();  // what the last call left is no longer needed
  const Session::Room room = session.room();
  bound(room.tokens, "shorten it or " + room.budget.fix);
  if (max_seq > 0) bound(max_seq, "shorten it or raise max_seq");
  if (engine != nullptr) bound(engine->max_seq, "shorten it or build the engine with a higher --max-seq");
  if (manifest.max_positions)
    bound(*manifest.max_positions, "shorten it: the model has learned no more positions");
  return limit;
}

void check_prompt(const std::vector<std::int64_t>& prompt, std::int64_t vocab_size,
                  const PositionLimit& limit) {
  require(!prompt.empty(), "a prompt is empty; give it at least one token");
  for (const std::int64_t id : prompt)
    require(id >= 0 && id < vocab_size, "token id " + std::to_string(id) +
                                            " is not in the model's vocabulary of " +
                                            std::to_string(vocab_size) + "; check the prompt's ids");
  require(static_cast<std::int64_t>(prompt.size()) <= limit.tokens,
          "a prompt has " + std::to_string(prompt.size()) + " tokens and " + std::to_string(limit.tokens) +
              " fit; " + limit.hint);
}

}  // namespace

const char* name(StopReason reason) {
  if (reason == StopReason::kEos) return "eos";
  return reason == StopReason::kLength ? "length" : "capacity";
}

struct Runner::State {
  Manifest manifest;
  std::unique_ptr<Session> session;
  const EngineRecord* engine = nullptr;  // of this back end, in the manifest
  std::int64_t max_batch = 0;
};

Runner::Runner(std::unique_ptr<State> state) : state_(std::move(state)) {}
Runner::Runner(Runner&& other) noexcept = default;
Runner& Runner::operator=(Runner&& other) noexcept = default;
Runner::~Runner() = default;

bool Runner::in_place() const {
  return state_->session->in_place();
}

Runner Runner::open(const std::string& bundle, const Options& options) {
  require(options.max_batch >= 0, "max_batch is negative; give 1 or more, or 0 for the default");
  require(options.threads >= 0, "threads is negative; give 1 or more, or 0 for the default");
  require(options.cache_memory >= 0,
          "cache_memory is negative; give a number of bytes, or 0 for what is free");
  auto state = std::make_unique<State>();
  state->manifest = read_manifest(bundle);
  require(options.heads == Heads::kChai || !state->manifest.has_static_membership,
          bundle +
              " has static membership: the heads it does not keep were cut away; use Heads::kChai, or "
              "export with --membership online");
  const auto engine = state->manifest.engines.find(name(options.backend));
  if (engine != state->manifest.engines.end()) state->engine = &engine->second;
  const std::int64_t most = state->engine != nullptr ? state->engine->max_batch : options.max_batch;
  require(options.max_batch <= most, "max_batch is " + std::to_string(options.max_batch) +
                                         " and the engine was built for " + std::to_string(most) +
                                         "; give less, or build with a higher --max-batch");
  state->max_batch = options.max_batch > 0 ? options.max_batch : most > 0 ? most : kDefaultMaxBatch;
  Options chosen = options;
  if (state->engine != nullptr && chosen.cache_memory == 0) chosen.cache_memory = state->engine->cache_memory;
  state->session = open_session(bundle, state->manifest, chosen);
  return Runner(std::move(state));
}

std::vector<Generation> Runner::generate(const std::vector<std::vector<std::int64_t>>& prompts,
                                         const GenerateOptions& options, const OnToken& on_token) {
  const Manifest& manifest = state_->manifest;
  require(options.max_new_tokens >= 1, "max_new_tokens is less than 1; give 1 or more");
  const PositionLimit limit = position_limit(manifest, state_->engine, *state_->session, options.max_seq);
  SamplingSettings sampling;
  sampling.temperature = options.temperature;
  sampling.top_k = options.top_k.value_or(manifest.top_k.value_or(kDefaultTopK));
  sampling.top_p = options.top_p.value_or(manifest.top_p.value_or(1.0));
  sampling.repetition_penalty =
      options.repetition_penalty.value_or(manifest.repetition_penalty.value_or(1.0));
  check(sampling);

  std::vector<Request> requests;
  for (const auto& prompt : prompts) {
    check_prompt(prompt, manifest.geometry.vocab_size, limit);
    const std::uint64_t seed = options.seed ? *options.seed : std::random_device()();
    requests.push_back({requests.size(), prompt, static_cast<std::int64_t>(prompt.size()),
                        Sampler(sampling, seed), 0, StopReason::kLength});
  }
  if (!requests.empty()) {
    const Limits limits{options.max_new_tokens, limit.tokens,
                        options.eos_token_ids.value_or(manifest.eos_token_ids)};
    const auto slots = static_cast<std::size_t>(state_->max_batch);
    Scheduler(*state_->session, manifest.geometry, limits, on_token).run(requests, slots);
  }
  std::vector<Generation> generations;
  for (const Request& request : requests) {
    const std::vector<std::int64_t> made(request.ids.begin() + request.prompt_tokens, request.ids.end());
    generations.push_back({made, request.prompt_tokens, request.stop_reason});
  }
  return generations;
}

}  // namespace chai
