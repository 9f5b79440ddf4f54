// What is refused in a manifest.
#include "runner/manifest.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Ids = std::vector<std::int64_t>;

TEST_CASE("wrong manifests are refused") {
  const auto directory = std::filesystem::temp_directory_path() / "chai_runner_parts_test";
  const auto read = [&](const std::string& from, const std::string& to) {
    std::string json =
        R"({"format": "chai-bundle/1", "op_version": 1, "dtype": "float32", "num_layers": 2,
            "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8, "value_head_dim": 8, "vocab_size": 50,
            "max_positions": null, "kept_heads": [1, 2], "probe_tokens": 5, "proof": {"max_abs_diff": 1.5e-3},
            "generation": {"eos_token_ids": [3], "top_p": 0.25}, "source": {"name": "caf\u0009é"},
            "files": {"model.onnx": {"sha256": "00", "size": 2}}, "engines": {}})";
    if (!from.empty()) json.replace(json.find(from), from.size(), to);
    std::filesystem::create_directories(directory);
    std::ofstream(directory / "manifest.json") << json;
    std::ofstream(directory / "model.onnx") << "ok";
    return chai::read_manifest(directory.string());
  };
  const chai::Manifest manifest = read("", "");
  CHECK(manifest.top_p.value() == 0.25);
  CHECK(manifest.eos_token_ids == Ids{3});
  CHECK_FALSE(manifest.max_positions.has_value());
  CHECK(manifest.geometry.cached_heads(chai::Heads::kChai, 0) == 1);
  CHECK(manifest.geometry.cached_heads(chai::Heads::kAll, 0) == 2);
  CHECK_THROWS_WITH_AS(read("chai-bundle/1", "chai-bundle/2"), doctest::Contains("reads chai-bundle/1"),
                       std::runtime_error);
  CHECK_THROWS_WITH_AS(read("\"op_version\": 1", "\"op_version\": 2"), doctest::Contains("op_version is 2"),
                       std::runtime_error);
  CHECK_THROWS_WITH_AS(read("[1, 2]", "[1, 3]"), doctest::Contains("kept_heads has 3"), std::runtime_error);
  CHECK_THROWS_WITH_AS(read("[1, 2]", "[1]"), doctest::Contains("one number per layer"), std::runtime_error);
  CHECK(manifest.geometry.num_caches() == 2);
  const chai::Geometry shared = read("[1, 2]", "[2, 2], \"kv_source_layers\": [0, 0]").geometry;
  CHECK(shared.has_cache(0));
  CHECK_FALSE(shared.has_cache(1));
  CHECK(shared.num_caches() == 1);
  CHECK_THROWS_WITH_AS(read("[1, 2]", "[1, 2], \"kv_source_layers\": [0]"),
                       doctest::Contains("kv_source_layers has not one"), std::runtime_error);
  CHECK_THROWS_WITH_AS(read("[1, 2]", "[1, 2], \"kv_source_layers\": [1, 1]"),
                       doctest::Contains("which has none before it"), std::runtime_error);
  CHECK_THROWS_WITH_AS(read("[1, 2]", "[1, 2], \"kv_source_layers\": [0, 0]"),
                       doctest::Contains("keeps other heads"), std::runtime_error);
  CHECK_THROWS_WITH_AS(read("\"head_dim\": 8", "\"head_dim\": \"x\""),
                       doctest::Contains("'/head_dim': expected an integer"), std::runtime_error);
  CHECK_THROWS_WITH_AS(read("float32", "int8"), doctest::Contains("dtype is int8"), std::runtime_error);
  CHECK_THROWS_WITH_AS(read("\"size\": 2", "\"size\": 3"), doctest::Contains("its size differs"),
                       std::runtime_error);
  CHECK_THROWS_WITH_AS(read("{", "["), doctest::Contains("JSON"), std::runtime_error);
  std::filesystem::remove_all(directory);
  CHECK_THROWS_WITH_AS(chai::read_manifest(directory.string()), doctest::Contains("is not a bundle"),
                       std::runtime_error);
}

}  // namespace
