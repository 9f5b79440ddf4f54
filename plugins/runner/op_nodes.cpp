#include "runner/op_nodes.h"

#include <cstdint>
#include <fstream>
#include <map>
#include <stdexcept>
#include <vector>

#include "chai/op_schema.h"
#include "support/error.h"

namespace chai {
namespace {

namespace own = schema::clustered_head_attention;
namespace shared = schema::shared_clustered_head_attention;

struct Node {
  std::string name;
  std::string op_type;
  std::string domain;
  std::map<std::string, std::int64_t> integers;  // attributes
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
  constexpr std::uint64_t kName = 3, kOpType = 4, kAttribute = 5, kDomain = 7;
  Node node;
  while (const std::uint64_t field = message.next()) {
    if (field == kName) {
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

std::vector<Node> read_op_nodes(const std::string& model) {
  constexpr std::uint64_t kGraph = 7, kNode = 1;
  std::ifstream file(model, std::ios::binary | std::ios::ate);
  require(file.is_open(), "it cannot be opened");
  const auto size = static_cast<std::uint64_t>(file.tellg());
  file.seekg(0);
  std::vector<Node> nodes;
  Message whole(file, size);
  while (const std::uint64_t part = whole.next()) {
    if (part != kGraph) {
      whole.skip();
      continue;
    }
    Message graph = whole.message();
    while (const std::uint64_t field = graph.next()) {
      if (field != kNode) {
        graph.skip();
        continue;
      }
      Node node = read_node(graph.message());
      if (node.domain == schema::kDomain) nodes.push_back(std::move(node));
    }
  }
  return nodes;
}

void check_count(const std::vector<Node>& nodes, const std::string& op_type, std::size_t wanted) {
  std::size_t found = 0;
  for (const Node& node : nodes) found += node.op_type == op_type ? 1 : 0;
  require(found == wanted, "does not fit its manifest: it has " + std::to_string(found) + " " + op_type +
                               " nodes and should have " + std::to_string(wanted));
}

void check_attribute(const Node& node, const std::string& name, std::int64_t otherwise, std::int64_t wanted) {
  const auto stated = node.integers.find(name);
  const std::int64_t found = stated == node.integers.end() ? otherwise : stated->second;
  require(found == wanted, "does not fit its manifest: " + name + " of node '" + node.name + "' is " +
                               std::to_string(found) + " and should be " + std::to_string(wanted));
}

}  // namespace

void check_op_nodes(const std::string& model, const Manifest& manifest) {
  try {
    const std::vector<Node> nodes = read_op_nodes(model);
    const std::size_t caches = manifest.geometry.num_caches();
    check_count(nodes, own::kOpType, caches);
    check_count(nodes, shared::kOpType, manifest.geometry.kept_heads.size() - caches);
    const own::Attributes defaults;
    for (const Node& node : nodes) {
      check_attribute(node, "probe_tokens", defaults.probe_tokens, manifest.geometry.probe_tokens);
      check_attribute(node, "online", defaults.online, manifest.has_static_membership ? 0 : 1);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(model + ": " + error.what() + "; export or rewrite again");
  }
}

}  // namespace chai
