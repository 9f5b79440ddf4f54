// The graph's op nodes against the manifest, on graphs written byte by byte.
#include "runner/op_nodes.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "chai/op_schema.h"
#include "tests/data.h"

namespace {

using chai::Json;

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

std::string attribute(const std::string& name, std::int64_t value) {
  return bytes(5, bytes(1, name) + number(3, static_cast<std::uint64_t>(value)) + number(20, 2));
}

struct Node {
  std::string op_type;
  std::string name;
  std::string key_cache;
  std::map<std::string, std::int64_t> attributes;
  std::string domain = "chai";

  std::string written() const {
    namespace own = chai::schema::clustered_head_attention;
    const bool is_own = op_type == own::kOpType;
    const std::size_t place =
        is_own ? own::kKeyCache : chai::schema::shared_clustered_head_attention::kKeyCache;
    std::string content;
    for (std::size_t input = 0; input < place; ++input) content += bytes(1, "x");
    content += bytes(1, key_cache) + bytes(3, name) + bytes(4, op_type);
    for (const auto& [key, value] : attributes) content += attribute(key, value);
    return bytes(1, content + bytes(7, domain));
  }
};

// A model of a graph with these nodes, and with fields of every kind around them.
std::string model(const std::vector<Node>& nodes, std::optional<std::int64_t> op_version) {
  const auto opset = [](const std::string& domain, std::int64_t version) {
    return bytes(8, bytes(1, domain) + number(2, static_cast<std::uint64_t>(version)));
  };
  const std::string weights(60, '\xff');
  std::string graph = bytes(5, weights);
  for (const Node& node : nodes) graph += node.written();
  return number(1, 9) + bytes(2, "exporter") + varint(100 << 3 | 1) + std::string(8, 'x') +
         varint(101 << 3 | 5) + std::string(4, 'x') + bytes(7, graph + bytes(2, "main")) + opset("", 20) +
         (op_version ? opset("chai", *op_version) : "");
}

const Json& table() {
  static const Json json = chai::test::read_data("op_node_cases.json");
  return json;
}

std::vector<std::int64_t> integers(const std::string& name) {
  std::vector<std::int64_t> result;
  for (const Json& each : table().at("manifest").at(name).array()) result.push_back(each.integer());
  return result;
}

chai::Manifest manifest() {
  const Json& fields = table().at("manifest");
  chai::Manifest manifest;
  manifest.geometry.num_layers = fields.at("num_layers").integer();
  manifest.geometry.kept_heads = integers("kept_heads");
  manifest.geometry.kv_source_layers = integers("kv_source_layers");
  manifest.geometry.probe_tokens = fields.at("probe_tokens").integer();
  manifest.key_bits = integers("key_bits");
  manifest.value_bits = integers("value_bits");
  manifest.group = fields.at("group").integer();
  manifest.windows = integers("windows");
  return manifest;
}

std::vector<Node> nodes() {
  std::vector<Node> result;
  for (const Json& each : table().at("nodes").array()) {
    Node node{each.at("op_type").string(), each.at("name").string(), each.at("key_cache").string(), {}};
    for (const auto& [name, value] : each.at("attributes").members()) node.attributes[name] = value.integer();
    result.push_back(std::move(node));
  }
  return result;
}

// A case of the table: the graph and the manifest after its changes.
struct Changed {
  std::vector<Node> graph = nodes();
  chai::Manifest said = manifest();
  std::optional<std::int64_t> op_version = table().at("op_version").integer();

  void make(const Json& change) {
    if (change.find("static")) said.has_static_membership = true;
    for (const auto& [name, value] : change.members())
      if (name == "op_version")
        op_version = value.kind() == Json::Kind::kNull ? std::nullopt : std::optional(value.integer());
    const auto at = change.find("node");
    if (!at) return;
    Node& node = graph.at(static_cast<std::size_t>(at->integer()));
    if (const auto name = change.find("attribute")) {
      node.attributes.erase(name->string());
      if (const auto value = change.find("value")) node.attributes[name->string()] = value->integer();
    } else if (change.find("beside")) {
      graph.push_back(node);
      graph.back().domain = "other";
    } else if (change.find("removed")) {
      graph.erase(graph.begin() + at->integer());
    } else {
      const auto cache = change.find("key_cache");
      node.key_cache = cache ? cache->string() : "";
    }
  }
};

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

TEST_CASE("the nodes of a graph are taken, or refused in one line, as the table says") {
  for (const Json& each : table().at("cases").array()) {
    CAPTURE(each.at("name").string());
    Changed changed;
    for (const Json& change : each.at("changes").array()) changed.make(change);
    const std::string found = error_of(model(changed.graph, changed.op_version), changed.said);
    const auto wanted = each.find("error");
    if (!wanted) {
      CHECK(found == "");
      continue;
    }
    CHECK(found.c_str() == doctest::Contains(wanted->string().c_str()));
    CHECK(found.c_str() == doctest::Contains("; export or rewrite again"));
    CHECK(found.find('\n') == std::string::npos);
  }
}

TEST_CASE("a graph that is cut off or damaged is refused") {
  const std::string whole = model(nodes(), chai::schema::kVersion);
  for (std::size_t cut = 0; cut < whole.size(); cut += 3) {
    CAPTURE(cut);
    const std::string part = whole.substr(0, cut);
    CHECK(error_of(part, manifest()) != "");
  }
  for (std::size_t place = 0; place < whole.size(); place += 3) {
    std::string damaged = whole;
    damaged[place] = static_cast<char>(damaged[place] ^ 0x55);
    error_of(damaged, manifest());  // an error or not, never a crash
  }
  CHECK(error_of(varint(7 << 3 | 2) + varint(std::uint64_t{1} << 62), manifest()) != "");
}

}  // namespace
