#include "runner/manifest.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "chai/op_schema.h"
#include "runner/manifest_schema.h"
#include "runner/sampler.h"
#include "support/error.h"
#include "support/json.h"
#include "support/json_schema.h"

namespace chai {
namespace {

constexpr const char* kFormat = "chai-bundle/1";
constexpr std::int64_t kDefaultGroup = schema::clustered_head_attention::Attributes().group;
constexpr const char* kAgain = "; run `chai-export export` (or `rewrite`) again";

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
  return name == "float16" ? ItemType::kFloat16 : ItemType::kBfloat16;
}

void read_generation(const Json& json, Manifest& manifest) {
  if (const auto ids = json.find("eos_token_ids")) manifest.eos_token_ids = integers(*ids);
  if (const auto value = json.find("top_k")) manifest.top_k = value->integer();
  if (const auto value = json.find("top_p")) manifest.top_p = value->real();
  if (const auto value = json.find("repetition_penalty")) manifest.repetition_penalty = value->real();
  SamplingSettings settings;
  settings.top_k = manifest.top_k.value_or(settings.top_k);
  settings.top_p = manifest.top_p.value_or(settings.top_p);
  settings.repetition_penalty = manifest.repetition_penalty.value_or(settings.repetition_penalty);
  check(settings);
}

// A relative path with forward slashes, without empty parts, "." and "..".
void check_name(const std::string& name) {
  require(name.find('\\') == std::string::npos && name.find('\0') == std::string::npos && !name.empty() &&
              name.back() != '/',
          "'" + name + "' is no path inside the bundle");
  std::istringstream parts(name);
  for (std::string part; std::getline(parts, part, '/');)
    require(!part.empty() && part != "." && part != "..", "'" + name + "' is no path inside the bundle");
}

Files read_files(const Json& json) {
  Files files;
  for (const auto& [name, record] : json.members()) {
    check_name(name);
    files[name] = record.at("size").integer();
  }
  return files;
}

EngineRecord read_engine(const std::string& backend, const Json& json, const std::string& model_sha256) {
  const std::string& own = json.at("backend").string();
  require(own == backend, "the engine of " + backend + " says that it is one of " + own);
  EngineRecord record;
  record.is_of_this_model = json.at("model_sha256").string() == model_sha256;
  record.max_batch = json.at("max_batch").integer();
  record.max_seq = json.at("max_seq").integer();
  if (const auto memory = json.find("cache_memory")) record.cache_memory = memory->integer();
  record.has_plugin = json.find("plugin_version").has_value();
  if (const auto files = json.find("files")) record.files = read_files(*files);
  return record;
}

void check_heads(const Geometry& geometry) {
  require(geometry.num_query_heads % geometry.num_kv_heads == 0,
          "num_query_heads is no multiple of num_kv_heads");
  require(static_cast<std::int64_t>(geometry.kept_heads.size()) == geometry.num_layers,
          "kept_heads has not one number per layer");
  for (const std::int64_t kept : geometry.kept_heads)
    require(kept <= geometry.num_kv_heads,
            "kept_heads has " + std::to_string(kept) + ", more than num_kv_heads");
}

void check_head_maps(const Json& maps, const Geometry& geometry) {
  const std::vector<Json> layers = maps.array();
  bool fits = static_cast<std::int64_t>(layers.size()) == geometry.num_layers;
  for (const Json& layer : layers) {
    const std::vector<std::int64_t> map = integers(layer);
    fits = fits && static_cast<std::int64_t>(map.size()) == geometry.num_query_heads &&
           *std::max_element(map.begin(), map.end()) < geometry.num_query_heads;
  }
  require(fits, "static.head_maps are not one map of query heads to query heads per layer");
}

// One number per layer; those of layers on one cache are the same.
std::vector<std::int64_t> read_bits(const Json& json, const std::string& name, const Geometry& geometry) {
  std::vector<std::int64_t> bits = integers(json.at(name));
  require(static_cast<std::int64_t>(bits.size()) == geometry.num_layers,
          name + " has not one number per layer");
  for (std::size_t layer = 0; layer < bits.size(); ++layer)
    require(bits[layer] == bits[static_cast<std::size_t>(geometry.kv_source_layers[layer])],
            name + " of layer " + std::to_string(layer) + " is not that of the cache it reads");
  return bits;
}

// None, or one number per layer; those of layers on one cache are the same.
std::vector<std::int64_t> read_windows(const Json& json, const Geometry& geometry) {
  const auto given = json.find("windows");
  if (!given) return {};
  std::vector<std::int64_t> windows = integers(*given);
  require(static_cast<std::int64_t>(windows.size()) == geometry.num_layers,
          "windows has not one number per layer");
  for (std::size_t layer = 0; layer < windows.size(); ++layer)
    require(windows[layer] == windows[static_cast<std::size_t>(geometry.kv_source_layers[layer])],
            "windows of layer " + std::to_string(layer) + " is not that of the cache it reads");
  return windows;
}

void check_group(std::int64_t group, std::int64_t dim, const std::vector<std::int64_t>& bits) {
  const auto stored = [&](std::int64_t wanted) {
    return std::find(bits.begin(), bits.end(), wanted) != bits.end();
  };
  require(!(stored(8) || stored(4)) || dim % group == 0,
          "group is " + std::to_string(group) + " and does not divide the head dim " + std::to_string(dim));
  require(!stored(4) || group % 2 == 0, "group is " + std::to_string(group) + " and 4 bits need an even one");
}

void read_storage(const Json& json, Manifest& manifest) {
  const Geometry& geometry = manifest.geometry;
  manifest.key_bits = read_bits(json, "key_bits", geometry);
  manifest.value_bits = read_bits(json, "value_bits", geometry);
  const auto group = json.find("group");
  manifest.group = group ? group->integer() : kDefaultGroup;
  check_group(manifest.group, geometry.head_dim, manifest.key_bits);
  check_group(manifest.group, geometry.value_head_dim, manifest.value_bits);
}

// Of a document that fits the schema.
Manifest read_fields(const Json& json) {
  Manifest manifest;
  manifest.item_type = item_type(json.at("dtype").string());
  Geometry& geometry = manifest.geometry;
  geometry.num_layers = json.at("num_layers").integer();
  geometry.num_query_heads = json.at("num_query_heads").integer();
  geometry.num_kv_heads = json.at("num_kv_heads").integer();
  geometry.head_dim = json.at("head_dim").integer();
  geometry.value_head_dim = json.at("value_head_dim").integer();
  geometry.vocab_size = json.at("vocab_size").integer();
  geometry.probe_tokens = json.at("probe_tokens").integer();
  geometry.kept_heads = integers(json.at("kept_heads"));
  check_heads(geometry);
  geometry.kv_source_layers = kv_source_layers(json, geometry);
  read_storage(json, manifest);
  manifest.windows = read_windows(json, geometry);
  geometry.windows = manifest.windows;
  geometry.windows.resize(static_cast<std::size_t>(geometry.num_layers), 0);
  if (const auto positions = json.find("max_positions")) manifest.max_positions = positions->integer();
  const auto membership = json.find("static");
  manifest.has_static_membership = membership.has_value();
  if (membership) check_head_maps(membership->at("head_maps"), geometry);
  if (const auto rope = json.find("rope")) {
    const auto lengths = rope->find("switch_lengths");
    manifest.switches_rope = lengths && !lengths->array().empty();
  }
  if (const auto generation = json.find("generation")) read_generation(*generation, manifest);
  const auto files = json.find("files");
  const auto model = files ? files->find("model.onnx") : std::nullopt;
  require(model.has_value(), "it lists no model.onnx");
  manifest.files = read_files(*files);
  if (const auto engines = json.find("engines"))
    for (const auto& [name, engine] : engines->members())
      manifest.engines[name] = read_engine(name, engine, model->at("sha256").string());
  return manifest;
}

const Json& manifest_schema() {
  static const Json schema = Json::parse(kManifestSchema);
  return schema;
}

}  // namespace

void check_files(const std::string& bundle, const Files& files, const std::string& again) {
  const std::filesystem::path root = std::filesystem::canonical(bundle);
  for (const auto& [name, size] : files) {
    const std::string path = bundle + "/" + name;
    std::error_code error;
    const std::filesystem::path real = std::filesystem::canonical(path, error);
    require(!error, path + " is missing" + again);
    const auto inside = std::mismatch(root.begin(), root.end(), real.begin(), real.end());
    require(inside.first == root.end(),
            path + " is a link that leads out of the bundle; copy the bundle with `cp -rL`");
    const auto found = std::filesystem::file_size(real, error);
    require(!error && static_cast<std::int64_t>(found) == size,
            path + " was changed after the bundle was written (its size differs)" + again);
  }
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
  try {
    const Json json = Json::parse(text.str());
    const auto format = json.find("format");
    require(format && format->kind() == Json::Kind::kString && format->string() == kFormat,
            "format is " + (format ? format->text() : "missing") + " and this library reads " + kFormat);
    const auto version = json.find("op_version");
    require(!version || version->kind() != Json::Kind::kInteger || version->integer() == schema::kVersion,
            "it has version " + (version ? version->text() : "") +
                " of the op and this library runs version " + std::to_string(schema::kVersion));
    check_schema(json, manifest_schema());
    manifest = read_fields(json);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path.string() + ": " + error.what() + kAgain);
  }
  check_files(bundle, manifest.files, kAgain);
  return manifest;
}

}  // namespace chai
