#include "op/cuda/program.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace chai::cuda {
namespace {

using Kind = PlannedLaunch::Argument::Kind;

// Its number is the op's version.
constexpr const char* kFormat = "chai-kernels/2";
// Sections of the workspace start at multiples of this, as chai_export/kernels counts them.
constexpr std::int64_t kAlignment = 256;
constexpr std::int64_t kMaxThreads = 1024;
constexpr std::int64_t kMaxSharedBytes = 1 << 20;
// Kernels load and store in pieces of this size: what an index may promise about addresses.
constexpr std::int64_t kMaxPointerAlignment = 256;
constexpr std::int64_t kMaxGrid = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxGridYZ = 65535;

constexpr std::array<std::string_view, static_cast<std::size_t>(Tensor::kCount)> kTensorNames = {
    "query",        "key",         "value",       "past_head_map",
    "past_lengths", "lengths",     "output",      "present_head_map",
    "key_cache",    "value_cache", "key_scales",  "value_scales",
    "page_table",   "sinks",       "alibi_slopes"};

std::int64_t bounded(const Json& json, std::int64_t low, std::int64_t high) {
  const std::int64_t value = json.integer();
  if (value < low || value > high) {
    throw std::runtime_error("the kernel index holds " + std::to_string(value) + " where " +
                             std::to_string(low) + " to " + std::to_string(high) + " is allowed");
  }
  return value;
}

std::int64_t item_bytes_of(const std::string& dtype) {
  if (dtype == "float32" || dtype == "int32") return 4;
  if (dtype == "float16" || dtype == "bfloat16") return 2;
  throw std::runtime_error("the kernel index has the unknown dtype " + dtype);
}

std::int64_t align(std::int64_t bytes) {
  if (bytes < 0 || bytes > std::numeric_limits<std::int64_t>::max() - kAlignment) {
    throw std::runtime_error("a workspace size is out of range");
  }
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

Program Program::parse(std::string_view index) {
  const Json root = Json::parse(index);
  Program program;
  if (root.at("format").string() != kFormat) {
    throw std::runtime_error("the kernel index has format '" + root.at("format").string() +
                             "' and this library reads '" + kFormat +
                             "'; compile the kernels with the chai-export that this library came with");
  }
  const Json spec = root.at("spec");
  constexpr std::int64_t kLarge = 1 << 20;
  program.spec_.dtype = spec.at("dtype").string();
  item_bytes_of(program.spec_.dtype);
  program.spec_.heads = bounded(spec.at("num_query_heads"), 1, kLarge);
  program.spec_.kv_heads = bounded(spec.at("num_kv_heads"), 1, kLarge);
  program.spec_.head_dim = bounded(spec.at("head_dim"), 1, kLarge);
  program.spec_.value_dim = bounded(spec.at("value_head_dim"), 1, kLarge);
  program.spec_.probe_tokens = bounded(spec.at("probe_tokens"), 1, kLarge);
  const auto flag = [&](const char* name) { return spec.at(name).text() == "true"; };
  program.spec_.key_bits = bounded(spec.at("key_bits"), 0, 16);
  program.spec_.value_bits = bounded(spec.at("value_bits"), 0, 16);
  program.spec_.group = bounded(spec.at("group_size"), 1, kLarge);
  program.spec_.softcap = flag("softcap");
  program.spec_.sinks = flag("sinks");
  program.spec_.slopes = flag("slopes");
  program.spec_.architecture = bounded(root.at("architecture"), 10, 9999);
  program.pointer_alignment_ =
      static_cast<std::size_t>(bounded(root.at("pointer_alignment"), 1, kMaxPointerAlignment));
  bounded(root.at("workspace_alignment"), kAlignment, kAlignment);
  for (const Json& json : root.at("workspace").array()) {
    const std::int64_t item_bytes = item_bytes_of(json.at("type").string());
    program.sections_.push_back({json.at("name").string(), item_bytes, Formula(json.at("count").string())});
  }
  for (const Json& json : root.at("launches").array()) program.parse_launch(json);
  if (program.launches_.empty()) throw std::runtime_error("the kernel index lists no launches");
  return program;
}

void Program::parse_launch(const Json& json) {
  Kernel kernel;
  kernel.file = json.at("file").string();
  kernel.symbol = json.at("kernel").string();
  kernel.sha256 = json.at("sha256").string();
  kernel.threads = static_cast<std::uint32_t>(bounded(json.at("threads"), 1, kMaxThreads));
  kernel.shared_bytes = static_cast<std::uint32_t>(bounded(json.at("shared_bytes"), 0, kMaxSharedBytes));
  kernels_.push_back(kernel);

  const std::vector<Json> grid = json.at("grid").array();
  if (grid.size() != 3) throw std::runtime_error("a launch in the kernel index needs three grid sizes");
  Launch launch{kernels_.size() - 1,
                Formula(json.at("when").string()),
                {Formula(grid[0].string()), Formula(grid[1].string()), Formula(grid[2].string())},
                {}};
  for (const Json& argument : json.at("arguments").array())
    launch.arguments.push_back(parse_argument(argument));
  launches_.push_back(std::move(launch));
}

Program::Argument Program::parse_argument(const Json& json) const {
  Argument argument{Kind::kNull, 0, 8, Formula("0")};
  const std::string& type = json.at("type").string();
  if (type == "int32") {
    argument.kind = Kind::kInteger;
    argument.item_bytes = 4;
    argument.formula = Formula(json.at("value").string());
    return argument;
  }
  if (type == "float32") {
    const std::string& attribute = json.at("attribute").string();
    if (attribute != "scale" && attribute != "softcap")
      throw std::runtime_error("a kernel asks for the unknown attribute '" + attribute + "'");
    argument.kind = attribute == "scale" ? Kind::kScale : Kind::kSoftcap;
    argument.item_bytes = 4;
    return argument;
  }
  if (type != "pointer")
    throw std::runtime_error("the kernel index has an argument of the unknown type '" + type + "'");
  // Pointers that the compiler added; the index is only written when the kernel does not use them.
  if (json.find("hidden")) return argument;
  const std::string& name = json.at("tensor").string();
  for (std::size_t i = 0; i < kTensorNames.size(); ++i) {
    if (kTensorNames[i] != name) continue;
    argument.kind = Kind::kTensor;
    argument.index = i;
    return argument;
  }
  for (std::size_t i = 0; i < sections_.size(); ++i) {
    if (sections_[i].name != name) continue;
    argument.kind = Kind::kWorkspace;
    argument.index = i;
    return argument;
  }
  throw std::runtime_error("a kernel asks for '" + name + "', which is no tensor of the op and no workspace");
}

std::vector<std::int64_t> Program::section_offsets(const Symbols& symbols) const {
  std::vector<std::int64_t> offsets{0};
  for (const Section& section : sections_) {
    const std::int64_t count = section.count.evaluate(symbols);
    std::int64_t bytes = 0;
    std::int64_t end = 0;
    if (__builtin_mul_overflow(count, section.item_bytes, &bytes) ||
        __builtin_add_overflow(offsets.back(), align(bytes), &end)) {
      throw std::runtime_error("a workspace size is out of range");
    }
    offsets.push_back(end);
  }
  return offsets;
}

std::size_t Program::workspace_bytes(const Symbols& symbols) const {
  return static_cast<std::size_t>(section_offsets(symbols).back());
}

Plan Program::plan(const Symbols& symbols) const {
  const std::vector<std::int64_t> offsets = section_offsets(symbols);
  Plan plan;
  for (const Launch& launch : launches_) {
    if (launch.when.evaluate(symbols) == 0) continue;
    const Kernel& kernel = kernels_[launch.kernel];
    PlannedLaunch planned;
    planned.kernel = launch.kernel;
    planned.size.threads = kernel.threads;
    planned.size.shared_bytes = kernel.shared_bytes;
    for (std::size_t axis = 0; axis < 3; ++axis) {
      const std::int64_t blocks = launch.grid[axis].evaluate(symbols);
      if (blocks < 1 || blocks > (axis == 0 ? kMaxGrid : kMaxGridYZ)) {
        throw std::runtime_error(kernel.symbol + " needs a grid of " + std::to_string(blocks) +
                                 " blocks on axis " + std::to_string(axis) +
                                 ", which no GPU has; lower the batch or the length");
      }
      planned.size.grid[axis] = static_cast<std::uint32_t>(blocks);
    }
    for (const Argument& argument : launch.arguments) {
      PlannedLaunch::Argument& bound = planned.arguments.emplace_back();
      bound.kind = argument.kind;
      bound.tensor = argument.index;
      bound.item_bytes = argument.item_bytes;
      if (argument.kind == Kind::kWorkspace) bound.value = offsets[argument.index];
      if (argument.kind == Kind::kInteger) bound.value = argument.formula.evaluate(symbols);
      if (argument.kind == Kind::kInteger && bound.value > std::numeric_limits<std::int32_t>::max()) {
        throw std::runtime_error(kernel.symbol + " takes a 32-bit integer and gets " +
                                 std::to_string(bound.value));
      }
    }
    plan.push_back(std::move(planned));
  }
  return plan;
}

void run(const Plan& plan, const Tensors& tensors, void* workspace, const Floats& floats, Launcher& launcher,
         Stream stream) {
  std::vector<std::uint64_t> storage;
  std::vector<void*> pointers;
  for (const PlannedLaunch& launch : plan) {
    storage.assign(launch.arguments.size(), 0);
    pointers.clear();
    for (std::size_t i = 0; i < launch.arguments.size(); ++i) {
      const PlannedLaunch::Argument& argument = launch.arguments[i];
      void* place = &storage[i];
      pointers.push_back(place);
      if (argument.kind == Kind::kTensor) {
        std::memcpy(place, &tensors[argument.tensor], sizeof(void*));
      } else if (argument.kind == Kind::kWorkspace) {
        const void* section = static_cast<char*>(workspace) + argument.value;
        std::memcpy(place, &section, sizeof(void*));
      } else if (argument.kind == Kind::kInteger) {
        std::memcpy(place, &argument.value, argument.item_bytes);  // little endian: its low bytes come first
      } else if (argument.kind == Kind::kScale) {
        std::memcpy(place, &floats.scale, sizeof(floats.scale));
      } else if (argument.kind == Kind::kSoftcap) {
        std::memcpy(place, &floats.softcap, sizeof(floats.softcap));
      }
    }
    launcher.launch(launch.kernel, launch.size, pointers.data(), stream);
  }
}

}  // namespace chai::cuda
