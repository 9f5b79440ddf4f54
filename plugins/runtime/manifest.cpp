#include "manifest.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "error.h"
#include "json.h"

namespace chai {
namespace {

constexpr const char* kFormat = "chai-bundle/1";
constexpr std::int64_t kOpVersion = 1;
constexpr const char* kAgain = "; run `chai-export export` (or `rewrite`) again";

const Json* present(const Json& parent, const char* name) {
  const Json* member = parent.find(name);
  return member == nullptr || member->is_null() ? nullptr : member;
}

std::int64_t count(const Json& parent, const char* name) {
  const std::int64_t value = parent.at(name).integer();
  require(value >= 1, std::string(name) + " is " + std::to_string(value) + ", less than 1");
  return value;
}

std::vector<std::int64_t> integers(const Json& json) {
  std::vector<std::int64_t> result;
  for (const Json& item : json.array()) result.push_back(item.integer());
  return result;
}

// Itself for every layer, unless the manifest says that layers read the caches of earlier ones.
std::vector<std::int64_t> kv_source_layers(const Json& json, const Manifest& manifest) {
  std::vector<std::int64_t> sources(static_cast<std::size_t>(manifest.num_layers));
  std::iota(sources.begin(), sources.end(), 0);
  const Json* given = present(json, "kv_source_layers");
  if (given == nullptr) return sources;
  sources = integers(*given);
  require(static_cast<std::int64_t>(sources.size()) == manifest.num_layers,
          "kv_source_layers has not one number per layer");
  for (std::size_t layer = 0; layer < sources.size(); ++layer) {
    const std::int64_t source = sources[layer];
    const bool earlier = source >= 0 && source <= static_cast<std::int64_t>(layer);
    require(earlier && sources[static_cast<std::size_t>(source)] == source,
            "layer " + std::to_string(layer) + " reads the cache of layer " + std::to_string(source) +
                ", which has none before it");
    require(manifest.kept_heads[layer] == manifest.kept_heads[static_cast<std::size_t>(source)],
            "layer " + std::to_string(layer) + " keeps other heads than the cache it reads");
  }
  return sources;
}

ItemType item_type(const std::string& name) {
  if (name == "float32") return ItemType::kFloat32;
  if (name == "float16") return ItemType::kFloat16;
  require(name == "bfloat16", "dtype is " + name);
  return ItemType::kBfloat16;
}

void read_generation(const Json& json, Manifest& manifest) {
  if (const Json* ids = present(json, "eos_token_ids")) manifest.eos_token_ids = integers(*ids);
  if (const Json* value = present(json, "top_k")) manifest.top_k = value->integer();
  if (const Json* value = present(json, "top_p")) manifest.top_p = value->real();
  if (const Json* value = present(json, "repetition_penalty")) manifest.repetition_penalty = value->real();
}

EngineRecord read_engine(const Json& json, const std::string& model_sha256) {
  EngineRecord record;
  record.is_of_this_model = json.at("model_sha256").string() == model_sha256;
  record.max_batch = count(json, "max_batch");
  record.max_seq = count(json, "max_seq");
  record.has_plugin = present(json, "plugin_version") != nullptr;
  return record;
}

Manifest read_fields(const Json& json) {
  Manifest manifest;
  const std::int64_t op_version = count(json, "op_version");
  require(op_version == kOpVersion, "op_version is " + std::to_string(op_version) + " and this library has " +
                                        std::to_string(kOpVersion));
  manifest.item_type = item_type(json.at("dtype").string());
  manifest.num_layers = count(json, "num_layers");
  manifest.num_query_heads = count(json, "num_query_heads");
  manifest.num_kv_heads = count(json, "num_kv_heads");
  manifest.head_dim = count(json, "head_dim");
  manifest.value_head_dim = count(json, "value_head_dim");
  manifest.vocab_size = count(json, "vocab_size");
  manifest.probe_tokens = count(json, "probe_tokens");
  manifest.kept_heads = integers(json.at("kept_heads"));
  if (present(json, "max_positions")) manifest.max_positions = count(json, "max_positions");
  manifest.has_static_membership = present(json, "static") != nullptr;
  require(manifest.num_query_heads % manifest.num_kv_heads == 0,
          "num_query_heads is no multiple of num_kv_heads");
  require(static_cast<std::int64_t>(manifest.kept_heads.size()) == manifest.num_layers,
          "kept_heads has not one number per layer");
  for (const std::int64_t kept : manifest.kept_heads)
    require(kept >= 1 && kept <= manifest.num_kv_heads,
            "kept_heads has " + std::to_string(kept) + ", not 1 to num_kv_heads");
  manifest.kv_source_layers = kv_source_layers(json, manifest);
  if (const Json* generation = present(json, "generation")) read_generation(*generation, manifest);
  return manifest;
}

void check_files(const std::filesystem::path& bundle, const Json& files) {
  for (std::size_t i = 0; i < files.names().size(); ++i) {
    const std::filesystem::path path = bundle / files.names()[i];
    std::error_code error;
    const auto size = std::filesystem::file_size(path, error);
    require(!error, path.string() + " is missing" + kAgain);
    require(static_cast<std::int64_t>(size) == files.values()[i].at("size").integer(),
            path.string() + " was changed after the bundle was written (its size differs)" + kAgain);
  }
}

}  // namespace

std::int64_t Manifest::cached_heads(Heads heads, std::int64_t layer) const {
  return heads == Heads::kAll ? num_kv_heads : kept_heads[static_cast<std::size_t>(layer)];
}

bool Manifest::has_cache(std::int64_t layer) const {
  return kv_source_layers[static_cast<std::size_t>(layer)] == layer;
}

std::size_t Manifest::num_caches() const {
  std::size_t count = 0;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) count += has_cache(layer) ? 1 : 0;
  return count;
}

Manifest read_manifest(const std::string& bundle) {
  const std::filesystem::path path = std::filesystem::path(bundle) / "manifest.json";
  std::ifstream stream(path, std::ios::binary);
  require(stream.is_open(), bundle +
                                " is not a bundle (no manifest.json); name a directory written by "
                                "`chai-export export` or `chai-export rewrite`");
  std::ostringstream text;
  text << stream.rdbuf();
  Manifest manifest;
  Json json;
  try {
    json = Json::parse(text.str());
    const std::string& format = json.at("format").string();
    require(format == kFormat, "format is " + format + " and this library reads " + kFormat);
    manifest = read_fields(json);
    const std::string& model_sha256 = json.at("files").at("model.onnx").at("sha256").string();
    if (const Json* engines = present(json, "engines")) {
      for (std::size_t i = 0; i < engines->names().size(); ++i)
        manifest.engines[engines->names()[i]] = read_engine(engines->values()[i], model_sha256);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path.string() + ": " + error.what() + kAgain);
  }
  check_files(bundle, json.at("files"));
  return manifest;
}

}  // namespace chai
