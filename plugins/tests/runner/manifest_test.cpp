// Reading manifests. tests/data/manifest_cases.json holds this reader and Python's to the same.
#include "runner/manifest.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runner/caches.h"
#include "tests/data.h"

namespace {

namespace fs = std::filesystem;
using chai::Json;

const Json& table() {
  static const Json json = chai::test::read_data("manifest_cases.json");
  return json;
}

// What a case changes: a path of names, and the value that takes its place, or none.
struct Change {
  std::vector<Json> path;
  std::optional<Json> value;
};

std::vector<Change> changes_of(const Json& test_case) {
  std::vector<Change> changes;
  if (const auto set = test_case.find("set"))
    for (const Json& change : set->array()) changes.push_back({change.array()[0].array(), change.array()[1]});
  if (const auto removed = test_case.find("remove"))
    for (const Json& path : removed->array()) changes.push_back({path.array(), std::nullopt});
  return changes;
}

// An object, as JSON, after the changes at a depth of their paths.
std::string changed(const Json& object, const std::vector<Change>& changes, std::size_t depth = 0) {
  std::string text;
  const auto add = [&](const std::string& name, const std::string& value) {
    text += (text.empty() ? "{" : ", ") + name + ": " + value;
  };
  std::vector<bool> done(changes.size());
  for (const auto& [name, value] : object.members()) {
    std::vector<Change> deeper;
    bool replaced = false;
    for (std::size_t i = 0; i < changes.size(); ++i) {
      if (changes[i].path[depth].string() != name) continue;
      done[i] = true;
      if (changes[i].path.size() > depth + 1) {
        deeper.push_back(changes[i]);
      } else {
        replaced = true;
        if (changes[i].value) add("\"" + name + "\"", changes[i].value->text());
      }
    }
    if (!replaced) add("\"" + name + "\"", deeper.empty() ? value.text() : changed(value, deeper, depth + 1));
  }
  for (std::size_t i = 0; i < changes.size(); ++i) {
    if (done[i]) continue;
    REQUIRE(changes[i].path.size() == depth + 1);
    REQUIRE(changes[i].value.has_value());
    add(changes[i].path[depth].text(), changes[i].value->text());
  }
  return text.empty() ? "{}" : text + "}";
}

// A folder that is gone with the object.
class Folder {
 public:
  Folder() {
    char name[] = "/tmp/chai-manifest-XXXXXX";
    REQUIRE(mkdtemp(name) != nullptr);
    path_ = name;
  }
  ~Folder() { fs::remove_all(path_); }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

void write(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// A bundle with this manifest; its files are empty.
std::string write_bundle(const fs::path& bundle, const std::string& manifest) {
  for (const auto& [name, record] : table().at("base").at("files").members()) write(bundle / name, "");
  write(bundle / "manifest.json", manifest);
  return bundle.string();
}

std::string error_of(const std::string& bundle) {
  try {
    chai::read_manifest(bundle);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

TEST_CASE("a manifest is taken, or refused in one line, as the table says") {
  const Folder folder;
  for (const Json& test_case : table().at("cases").array()) {
    CAPTURE(test_case.at("name").string());
    const std::string manifest = changed(table().at("base"), changes_of(test_case));
    const std::string bundle = write_bundle(folder.path() / "bundle", manifest);
    const std::string error = error_of(bundle);
    if (test_case.at("usable").text() == "true") {
      CHECK(error == "");
      continue;
    }
    CHECK(error.rfind(bundle, 0) == 0);
    CHECK(error.find('\n') == std::string::npos);
    CHECK(error.find("again") != std::string::npos);
  }
}

TEST_CASE("a link may not lead out of the bundle") {
  for (const Json& layout : table().at("layouts").array()) {
    CAPTURE(layout.at("name").string());
    const Folder folder;
    const fs::path bundle = folder.path() / "bundle";
    write_bundle(bundle, table().at("base").text());
    for (const char* name : {"bundle/other", "beside", "folder beside/file"}) write(folder.path() / name, "");
    for (const auto& [name, target] : layout.at("links").members()) {
      fs::remove_all(bundle / name);
      fs::create_symlink(target.string(), bundle / name);
    }
    CHECK((error_of(bundle.string()) == "") == (layout.at("usable").text() == "true"));
  }
}

TEST_CASE("a manifest's fields are read") {
  const Folder folder;
  const std::string text = table().at("base").text();
  const chai::Manifest manifest = chai::read_manifest(write_bundle(folder.path(), text));
  CHECK(manifest.top_p.value() == 0.9);
  CHECK(manifest.eos_token_ids == std::vector<std::int64_t>{2, 7});
  CHECK(manifest.max_positions.value() == 128);
  const chai::Geometry& geometry = manifest.geometry;
  CHECK(geometry.cached_heads(chai::Heads::kChai, 0) == 2);
  CHECK(geometry.cached_heads(chai::Heads::kAll, 0) == 4);
  CHECK(geometry.has_cache(0));
  CHECK_FALSE(geometry.has_cache(1));
  CHECK(geometry.num_caches() == 2);
  CHECK(manifest.engines.at("tensorrt").has_plugin);
  CHECK(manifest.engines.at("tensorrt").cache_memory == std::int64_t{1} << 40);
  CHECK(manifest.engines.at("tensorrt").is_of_this_model);
  CHECK(manifest.engines.at("tensorrt").files.count("engines/tensorrt/engine.plan") == 1);
}

TEST_CASE("caches are those of the bits and the groups") {
  const Folder folder;
  const auto tensors = [&](const std::vector<Change>& changes, chai::Heads heads) {
    const std::string text = changed(table().at("base"), changes);
    std::string all;
    for (const chai::CacheTensor& tensor :
         chai::cache_tensors(chai::read_manifest(write_bundle(folder.path(), text)), heads))
      all += tensor.name + " " + std::to_string(tensor.heads) + "x" + std::to_string(tensor.columns) + "*" +
             std::to_string(chai::item_size(tensor.type)) + ", ";
    return all;
  };
  // Keys in 8, 8 and 4 bits, values in 4, 4 and the dtype's, in groups of 16. Layer 1 reads the cache of
  // layer 0.
  CHECK(tensors({}, chai::Heads::kChai) ==
        "key.0 2x16*1, value.0 4x8*1, key_scales.0 2x1*2, value_scales.0 4x2*2, "
        "key.2 4x8*1, value.2 4x16*4, key_scales.2 4x2*2, ");
  CHECK(tensors({}, chai::Heads::kAll).find("key.0 4x16*1") == 0);
  const chai::Manifest manifest = chai::read_manifest(folder.path().string());
  CHECK(chai::bytes_per_token(chai::cache_tensors(manifest, chai::Heads::kChai)) ==
        2 * 16 + 4 * 8 + 2 * 2 + 4 * 4 + 4 * 8 + 4 * 64 + 4 * 4);
  const auto exact = [](const char* name) { return Change{{Json::parse(name)}, Json::parse("[0, 0, 0]")}; };
  CHECK(tensors({exact("\"key_bits\""), exact("\"value_bits\"")}, chai::Heads::kChai) ==
        "key.0 2x16*4, value.0 4x16*4, key.2 4x16*4, value.2 4x16*4, ");
  CHECK(tensors({{{Json::parse("\"kept_heads\"")}, Json::parse("[1, 1, 3]")}}, chai::Heads::kChai)
            .find("key.0 1x16") == 0);
}

TEST_CASE("errors name the cause") {
  const Folder folder;
  const auto error = [&](std::string text) {
    return error_of(write_bundle(folder.path() / "bundle", std::move(text)));
  };
  const auto contains = [](const char* part) { return doctest::Contains(part); };
  const std::string base = table().at("base").text();
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = base;
    REQUIRE(text.find(from) != std::string::npos);
    return text.replace(text.find(from), from.size(), to);
  };
  CHECK(error(with("\"dtype\":\"float32\"", "\"dtype\":\"int8\"")).c_str() ==
        contains("'/dtype': \"int8\" is not \"float32\" or \"float16\" or \"bfloat16\""));
  CHECK(error(with("\"head_dim\":16", "\"head_dim\":\"x\"")).c_str() ==
        contains("'/head_dim': expected an integer"));
  CHECK(error(with("\"head_dim\":16", "\"head_dim\":0")).c_str() ==
        contains("'/head_dim': 0 is less than 1"));
  CHECK(error(with("\"head_dim\":16,", "")).c_str() == contains("member 'head_dim' is missing"));
  CHECK(error(with("\"head_dim\":16", "\"head_dim\":16,\"x\\ny\":1")).c_str() ==
        contains("member 'x y' is unknown"));
  CHECK(error(with("chai-bundle/1", "chai-bundle/2")).c_str() == contains("reads chai-bundle/1"));
  for (const char* version : {"1", "3"})
    CHECK(error(with("\"op_version\":2,\"opset\"", "\"op_version\":" + std::string(version) + ",\"opset\""))
              .c_str() ==
          contains(("it has version " + std::string(version) + " of the op and this library runs version 2")
                       .c_str()));
  CHECK(error("[1, 2").c_str() == contains("JSON: "));
  write(folder.path() / "bundle" / "folder" / "file", "");
  write(folder.path() / "bundle" / "manifest.json", base);
  write(folder.path() / "bundle" / "model.onnx", "x");
  CHECK(error_of((folder.path() / "bundle").string()).c_str() == contains("its size differs"));
  fs::remove(folder.path() / "bundle" / "model.onnx");
  CHECK(error_of((folder.path() / "bundle").string()).c_str() == contains("model.onnx is missing"));
  CHECK(error_of((folder.path() / "none").string()).c_str() == contains("is not a bundle"));
}

}  // namespace
