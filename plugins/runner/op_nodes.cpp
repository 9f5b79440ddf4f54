#include "runner/op_nodes.h"

#include <cstdint>
#include <fstream>
#include <map>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "chai/op_schema.h"
#include "runner/graph_names.h"
#include "support/error.h"

namespace chai {
namespace {

namespace own = schema::clustered_head_attention;
namespace shared = schema::shared_clustered_head_attention;

struct Node {
  std::string name;
  std::string op_type;
  std::string domain;
  std::vector<std::string> inputs;
  std::map<std::string, std::int64_t> integers;  // attributes
};

// What the check reads of a model.
struct Graph {
  std::vector<Node> nodes;
  std::optional<std::int64_t> op_version;
};

// A message of protobuf, read field by field from a part of a file: what is skipped is not read.
class Message {
 public:
  Message(std::istream& file, std::uint64_t size) : file_(file), rest_(size) {}

  // The number of the next field; 0 at the end. Its value must be taken by one of the calls below.
  std::uint64_t next() {
    if (rest_ == 0) return 0;
    const std::uint64_t key = integer();
    wire_type_ = key & 7;
    size_ = wire_type_ == 2 ? integer() : wire_type_ == 1 ? 8 : 4;
    if (wire_type_ == 0) value_ = integer();
    const bool known = wire_type_ <= 2 || wire_type_ == 5;
    require(known && (wire_type_ == 0 || size_ <= rest_), "it is damaged");
    return key >> 3;
  }

  void skip() {
    if (wire_type_ != 0) file_.seekg(static_cast<std::streamoff>(take()), std::ios::cur);
  }

  Message message() {
    require(wire_type_ == 2, "it is damaged");
    return Message(file_, take());
  }

  std::string text() {
    std::string text(message().rest_, '\0');
    file_.read(text.data(), static_cast<std::streamsize>(text.size()));
    require(file_.good(), "it is cut off");
    return text;
  }

  std::int64_t number() const {
    require(wire_type_ == 0, "it is damaged");
    return static_cast<std::int64_t>(value_);
  }

 private:
  std::uint64_t take() {
    rest_ -= size_;
    return size_;
  }

  std::uint64_t integer() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const int byte = file_.get();
      require(byte != std::char_traits<char>::eof() && rest_ > 0, "it is cut off");
      --rest_;
      value |= static_cast<std::uint64_t>(byte & 127) << shift;
      if (byte < 128) return value;
    }
    throw std::runtime_error("it is damaged");
  }

  std::istream& file_;
  std::uint64_t rest_;
  std::uint64_t wire_type_ = 0;
  std::uint64_t size_ = 0;
  std::uint64_t value_ = 0;
};

// The numbers are those of onnx.proto.
void read_attribute(Message message, Node& node) {
  constexpr std::uint64_t kName = 1, kInteger = 3;
  std::string name;
  std::int64_t value = 0;
  while (const std::uint64_t field = message.next()) {
    if (field == kName) {
      name = message.text();
    } else if (field == kInteger) {
      value = message.number();
    } else {
      message.skip();
    }
  }
  node.integers[name] = value;
}

Node read_node(Message message) {
  constexpr std::uint64_t kInput = 1, kName = 3, kOpType = 4, kAttribute = 5, kDomain = 7;
  Node node;
  while (const std::uint64_t field = message.next()) {
    if (field == kInput) {
      node.inputs.push_back(message.text());
    } else if (field == kName) {
      node.name = message.text();
    } else if (field == kOpType) {
      node.op_type = message.text();
    } else if (field == kDomain) {
      node.domain = message.text();
    } else if (field == kAttribute) {
      read_attribute(message.message(), node);
    } else {
      message.skip();
    }
  }
  return node;
}

void read_opset(Message message, Graph& graph) {
  constexpr std::uint64_t kDomain = 1, kVersion = 2;
  std::string domain;
  std::int64_t version = 0;
  while (const std::uint64_t field = message.next()) {
    if (field == kDomain) {
      domain = message.text();
    } else if (field == kVersion) {
      version = message.number();
    } else {
      message.skip();
    }
  }
  if (domain == schema::kDomain && !graph.op_version) graph.op_version = version;
}

void read_nodes(Message message, Graph& graph) {
  constexpr std::uint64_t kNode = 1;
  while (const std::uint64_t field = message.next()) {
    if (field != kNode) {
      message.skip();
      continue;
    }
    Node node = read_node(message.message());
    if (node.domain == schema::kDomain) graph.nodes.push_back(std::move(node));
  }
}

Graph read_graph(const std::string& model) {
  constexpr std::uint64_t kGraph = 7, kOpset = 8;
  std::ifstream file(model, std::ios::binary | std::ios::ate);
  require(file.is_open(), "it cannot be opened");
  const auto size = static_cast<std::uint64_t>(file.tellg());
  file.seekg(0);
  Graph graph;
  Message whole(file, size);
  while (const std::uint64_t part = whole.next()) {
    if (part == kGraph) {
      read_nodes(whole.message(), graph);
    } else if (part == kOpset) {
      read_opset(whole.message(), graph);
    } else {
      whole.skip();
    }
  }
  return graph;
}

void check_count(const std::vector<Node>& nodes, const std::string& op_type, std::size_t wanted) {
  std::size_t found = 0;
  for (const Node& node : nodes) found += node.op_type == op_type ? 1 : 0;
  require(found == wanted, "does not fit its manifest: it has " + std::to_string(found) + " " + op_type +
                               " nodes and should have " + std::to_string(wanted));
}

void check_version(const std::optional<std::int64_t>& found) {
  require(found == schema::kVersion, "does not fit its manifest: the op's version is " +
                                         (found ? std::to_string(*found) : "None") + " and should be " +
                                         std::to_string(schema::kVersion));
}

// The layer whose cache a node reads; its storage is that of the layers that share it.
std::size_t cache_layer(const Node& node, const Geometry& geometry) {
  const std::size_t place = node.op_type == shared::kOpType ? shared::kKeyCache : own::kKeyCache;
  const std::string name = place < node.inputs.size() ? node.inputs[place] : "";
  for (std::size_t layer = 0; layer < geometry.kept_heads.size(); ++layer) {
    const std::string cache = "key." + std::to_string(layer);
    if (geometry.has_cache(static_cast<std::int64_t>(layer)) &&
        (name == graph::kPast + cache || name == graph::kPresent + cache))
      return layer;
  }
  throw std::runtime_error("node '" + node.name + "' reads '" + (name.empty() ? "nothing" : name) +
                           "' instead of a layer's cache");
}

void check_attribute(const Node& node, const std::string& name, std::int64_t otherwise, std::int64_t wanted) {
  const auto stated = node.integers.find(name);
  const std::int64_t found = stated == node.integers.end() ? otherwise : stated->second;
  require(found == wanted, "does not fit its manifest: " + name + " of node '" + node.name + "' is " +
                               std::to_string(found) + " and should be " + std::to_string(wanted));
}

void check_attributes(const Node& node, const Manifest& manifest) {
  const own::Attributes defaults;
  const std::size_t layer = cache_layer(node, manifest.geometry);
  check_attribute(node, "probe_tokens", defaults.probe_tokens, manifest.geometry.probe_tokens);
  check_attribute(node, "online", defaults.online, manifest.has_static_membership ? 0 : 1);
  check_attribute(node, "key_bits", defaults.key_bits, manifest.key_bits[layer]);
  check_attribute(node, "value_bits", defaults.value_bits, manifest.value_bits[layer]);
  check_attribute(node, "group", defaults.group, manifest.group);
  check_attribute(node, "window", defaults.window, manifest.windows.empty() ? 0 : manifest.windows[layer]);
}

}  // namespace

void check_op_nodes(const std::string& model, const Manifest& manifest) {
  try {
    const Graph graph = read_graph(model);
    const std::size_t caches = manifest.geometry.num_caches();
    check_count(graph.nodes, own::kOpType, caches);
    check_count(graph.nodes, shared::kOpType, manifest.geometry.kept_heads.size() - caches);
    check_version(graph.op_version);
    for (const Node& node : graph.nodes) check_attributes(node, manifest);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(model + ": " + error.what() + "; export or rewrite again");
  }
}

}  // namespace chai
