// The graph's op nodes against the manifest, on graphs written byte by byte.
#include "runner/op_nodes.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>

#include "tests/data.h"

namespace {

std::string varint(std::uint64_t value) {
  std::string bytes;
  for (; value >= 128; value >>= 7) bytes += static_cast<char>((value & 127) | 128);
  return bytes + static_cast<char>(value);
}

std::string number(std::uint64_t field, std::uint64_t value) {
  return varint(field << 3) + varint(value);
}

std::string bytes(std::uint64_t field, const std::string& content) {
  return varint(field << 3 | 2) + varint(content.size()) + content;
}

std::string attribute(const std::string& name, std::uint64_t value) {
  return bytes(5, bytes(1, name) + number(3, value) + number(20, 2));
}

std::string node(const std::string& op_type, const std::string& attributes,
                 const std::string& domain = "chai") {
  return bytes(1, bytes(1, "query") + bytes(3, "layer") + bytes(4, op_type) + attributes + bytes(7, domain));
}

// A model of a graph with these nodes, and with fields of every kind around them.
std::string model(const std::string& nodes) {
  const std::string weights(60, '\xff');
  return number(1, 9) + bytes(2, "exporter") + varint(100 << 3 | 1) + std::string(8, 'x') +
         varint(101 << 3 | 5) + std::string(4, 'x') + bytes(7, bytes(5, weights) + nodes + bytes(2, "main")) +
         bytes(8, "opset");
}

// Two layers, the second of which may read the first one's cache.
chai::Manifest manifest(bool shared) {
  chai::Manifest manifest;
  manifest.geometry.num_layers = 2;
  manifest.geometry.kept_heads = {1, 1};
  manifest.geometry.kv_source_layers = {0, shared ? 0 : 1};
  manifest.geometry.probe_tokens = 16;
  return manifest;
}

std::string error_of(const std::string& content, const chai::Manifest& manifest) {
  char name[] = "/tmp/chai-model-XXXXXX";
  const int descriptor = mkstemp(name);
  REQUIRE(descriptor >= 0);
  std::ofstream(name, std::ios::binary) << content;
  std::string error;
  try {
    chai::check_op_nodes(name, manifest);
  } catch (const std::runtime_error& caught) {
    error = caught.what();
  }
  std::remove(name);
  return error;
}

const std::string kOwn = "ClusteredHeadAttention";
const std::string kShared = "SharedClusteredHeadAttention";
const std::string kProbe = attribute("probe_tokens", 16);

TEST_CASE("nodes that fit the manifest are taken") {
  CHECK(error_of(model(node(kOwn, kProbe) + node(kOwn, kProbe)), manifest(false)) == "");
  CHECK(error_of(model(node(kOwn, kProbe) + node(kShared, kProbe)), manifest(true)) == "");
  // Of other domains any node may have any attribute.
  const std::string other = node(kOwn, attribute("probe_tokens", 3), "other") + node("MatMul", "", "");
  CHECK(error_of(model(node(kOwn, kProbe) + other + node(kOwn, kProbe)), manifest(false)) == "");
  // An attribute that is left out has its default.
  chai::Manifest five = manifest(false);
  five.geometry.probe_tokens = 5;
  CHECK(error_of(model(node(kOwn, "") + node(kOwn, attribute("probe_tokens", 5))), five) == "");
  chai::Manifest fixed = manifest(false);
  fixed.has_static_membership = true;
  const std::string offline = kProbe + attribute("online", 0);
  CHECK(error_of(model(node(kOwn, offline) + node(kOwn, offline)), fixed) == "");
}

TEST_CASE("nodes that do not fit the manifest are refused by name") {
  const auto contains = [](const char* part) { return doctest::Contains(part); };
  CHECK(error_of(model(node(kOwn, kProbe)), manifest(false)).c_str() ==
        contains("it has 1 ClusteredHeadAttention nodes and should have 2; export or rewrite again"));
  CHECK(error_of(model(node(kOwn, kProbe) + node(kOwn, kProbe)), manifest(true)).c_str() ==
        contains("it has 2 ClusteredHeadAttention nodes and should have 1"));
  CHECK(error_of(model(node(kOwn, kProbe) + node(kOwn, "")), manifest(false)).c_str() ==
        contains("probe_tokens of node 'layer' is 5 and should be 16"));
  const std::string offline = kProbe + attribute("online", 0);
  CHECK(error_of(model(node(kOwn, kProbe) + node(kOwn, offline)), manifest(false)).c_str() ==
        contains("online of node 'layer' is 0 and should be 1"));
}

TEST_CASE("a graph that is cut off or damaged is refused") {
  const std::string whole = model(node(kOwn, kProbe) + node(kOwn, kProbe));
  for (std::size_t cut = 0; cut < whole.size(); cut += 3) {
    CAPTURE(cut);
    const std::string part = whole.substr(0, cut);
    // What follows the graph is not looked at.
    if (cut < whole.size() - bytes(8, "opset").size()) CHECK(error_of(part, manifest(false)) != "");
  }
  for (std::size_t place = 0; place < whole.size(); place += 3) {
    std::string damaged = whole;
    damaged[place] = static_cast<char>(damaged[place] ^ 0x55);
    error_of(damaged, manifest(false));  // an error or not, never a crash
  }
  CHECK(error_of(varint(7 << 3 | 2) + varint(std::uint64_t{1} << 62), manifest(false)) != "");
}

}  // namespace
