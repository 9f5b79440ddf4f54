#include "runner/manifest.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "support/error.h"
#include "support/json.h"

namespace chai {
namespace {

constexpr const char* kFormat = "chai-bundle/1";
constexpr std::int64_t kOpVersion = 1;
constexpr const char* kAgain = "; run `chai-export export` (or `rewrite`) again";

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
std::vector<std::int64_t> kv_source_layers(const Json& json, const Geometry& geometry) {
  std::vector<std::int64_t> sources(static_cast<std::size_t>(geometry.num_layers));
  std::iota(sources.begin(), sources.end(), 0);
  const std::optional<Json> given = json.find("kv_source_layers");
  if (!given) return sources;
  sources = integers(*given);
  require(static_cast<std::int64_t>(sources.size()) == geometry.num_layers,
          "kv_source_layers has not one number per layer");
  for (std::size_t layer = 0; layer < sources.size(); ++layer) {
    const std::int64_t source = sources[layer];
    const bool earlier = source >= 0 && source <= static_cast<std::int64_t>(layer);
    require(earlier && sources[static_cast<std::size_t>(source)] == source,
            "layer " + std::to_string(layer) + " reads the cache of layer " + std::to_string(source) +
                ", which has none before it");
    require(geometry.kept_heads[layer] == geometry.kept_heads[static_cast<std::size_t>(source)],
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
  if (const auto ids = json.find("eos_token_ids")) manifest.eos_token_ids = integers(*ids);
  if (const auto value = json.find("top_k")) manifest.top_k = value->integer();
  if (const auto value = json.find("top_p")) manifest.top_p = value->real();
  if (const auto value = json.find("repetition_penalty")) manifest.repetition_penalty = value->real();
}

EngineRecord read_engine(const Json& json, const std::string& model_sha256) {
  EngineRecord record;
  record.is_of_this_model = json.at("model_sha256").string() == model_sha256;
  record.max_batch = count(json, "max_batch");
  record.max_seq = count(json, "max_seq");
  record.has_plugin = json.find("plugin_version").has_value();
  return record;
}

Manifest read_fields(const Json& json) {
  Manifest manifest;
  const std::int64_t op_version = count(json, "op_version");
  require(op_version == kOpVersion, "op_version is " + std::to_string(op_version) + " and this library has " +
                                        std::to_string(kOpVersion));
  manifest.item_type = item_type(json.at("dtype").string());
  Geometry& geometry = manifest.geometry;
  geometry.num_layers = count(json, "num_layers");
  geometry.num_query_heads = count(json, "num_query_heads");
  geometry.num_kv_heads = count(json, "num_kv_heads");
  geometry.head_dim = count(json, "head_dim");
  geometry.value_head_dim = count(json, "value_head_dim");
  geometry.vocab_size = count(json, "vocab_size");
  geometry.probe_tokens = count(json, "probe_tokens");
  geometry.kept_heads = integers(json.at("kept_heads"));
  if (json.find("max_positions")) manifest.max_positions = count(json, "max_positions");
  manifest.has_static_membership = json.find("static").has_value();
  require(geometry.num_query_heads % geometry.num_kv_heads == 0,
          "num_query_heads is no multiple of num_kv_heads");
  require(static_cast<std::int64_t>(geometry.kept_heads.size()) == geometry.num_layers,
          "kept_heads has not one number per layer");
  for (const std::int64_t kept : geometry.kept_heads)
    require(kept >= 1 && kept <= geometry.num_kv_heads,
            "kept_heads has " + std::to_string(kept) + ", not 1 to num_kv_heads");
  geometry.kv_source_layers = kv_source_layers(json, geometry);
  if (const auto generation = json.find("generation")) read_generation(*generation, manifest);
  return manifest;
}

void check_files(const std::filesystem::path& bundle, const Json& files) {
  for (const auto& [name, file] : files.members()) {
    const std::filesystem::path path = bundle / name;
    std::error_code error;
    const auto size = std::filesystem::file_size(path, error);
    require(!error, path.string() + " is missing" + kAgain);
    require(static_cast<std::int64_t>(size) == file.at("size").integer(),
            path.string() + " was changed after the bundle was written (its size differs)" + kAgain);
  }
}

}  // namespace

Manifest read_manifest(const std::string& bundle) {
  const std::filesystem::path path = std::filesystem::path(bundle) / "manifest.json";
  std::ifstream stream(path, std::ios::binary);
  require(stream.is_open(), bundle +
                                " is not a bundle (no manifest.json); name a directory written by "
                                "`chai-export export` or `chai-export rewrite`");
  std::ostringstream text;
  text << stream.rdbuf();
  Manifest manifest;
  std::optional<Json> files;
  try {
    const Json json = Json::parse(text.str());
    const std::string& format = json.at("format").string();
    require(format == kFormat, "format is " + format + " and this library reads " + kFormat);
    manifest = read_fields(json);
    files = json.at("files");
    const std::string& model_sha256 = files->at("model.onnx").at("sha256").string();
    if (const auto engines = json.find("engines")) {
      for (const auto& [name, engine] : engines->members())
        manifest.engines[name] = read_engine(engine, model_sha256);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path.string() + ": " + error.what() + kAgain);
  }
  check_files(bundle, *files);
  return manifest;
}

}  // namespace chai
