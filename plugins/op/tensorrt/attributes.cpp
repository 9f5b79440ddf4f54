#include "op/tensorrt/attributes.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace chai::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kDirectory = "kernel_directory";
constexpr const char* kKernels = "kernels";

[[noreturn]] void fail(const PluginField& field, const std::string& reason) {
  throw std::runtime_error("field '" + std::string(field.name) + "' " + reason);
}

template <typename Value>
Value single(const PluginField& field) {
  if (field.length != 1 || field.data == nullptr) fail(field, "must hold one value");
  Value value;
  std::memcpy(&value, field.data, sizeof(value));
  return value;
}

std::string_view bytes_of(const PluginField& field) {
  if (field.length < 1 || field.data == nullptr) fail(field, "is empty");
  return {static_cast<const char*>(field.data), static_cast<std::size_t>(field.length)};
}

void read_scale(const PluginField& field, Attributes& attributes) {
  attributes.scale = single<float>(field);
  if (!std::isfinite(attributes.scale)) fail(field, "must be finite");
}

void read_probe_tokens(const PluginField& field, Attributes& attributes) {
  attributes.probe_tokens = single<std::int32_t>(field);
  if (attributes.probe_tokens < 1) fail(field, "must be at least 1");
}

void read_online(const PluginField& field, Attributes& attributes) {
  attributes.online = single<std::int32_t>(field);
  if (attributes.online != 0 && attributes.online != 1) fail(field, "must be 0 or 1");
}

void read_directory(const PluginField& field, Attributes& attributes) {
  std::string directory(bytes_of(field));
  directory.resize(std::strlen(directory.c_str()));  // some parsers count the terminator
  attributes.kernels = cuda::KernelImage::from_directory(directory);
}

void read_kernels(const PluginField& field, Attributes& attributes) {
  attributes.kernels = cuda::KernelImage::from_bytes(bytes_of(field));
}

PluginField view_kernels(const FieldSpec& spec, const Attributes& attributes) {
  const std::string& bytes = attributes.kernels->bytes();
  if (bytes.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw std::runtime_error("the kernels exceed 2 GiB, which a plugin field cannot hold");
  }
  return {spec.name, bytes.data(), spec.type, static_cast<std::int32_t>(bytes.size())};
}

// Integers in a range that have no meaning beyond it, one pair of functions for each.
template <std::int32_t Attributes::* kMember>
void read_count(const PluginField& field, Attributes& attributes) {
  attributes.*kMember = single<std::int32_t>(field);
  if (attributes.*kMember < 0) fail(field, "must not be negative");
}

template <auto kMember>
PluginField view_member(const FieldSpec& spec, const Attributes& attributes) {
  return {spec.name, &(attributes.*kMember), spec.type, 1};
}

void read_softcap(const PluginField& field, Attributes& attributes) {
  attributes.softcap = single<float>(field);
  if (!std::isfinite(attributes.softcap) || attributes.softcap < 0.0f)
    fail(field, "must be finite and not negative");
}

const FieldSpec* find(const std::vector<FieldSpec>& table, const char* name) {
  for (const FieldSpec& spec : table) {
    if (name != nullptr && std::strcmp(spec.name, name) == 0) return &spec;
  }
  return nullptr;
}

}  // namespace

const std::vector<FieldSpec>& field_table() {
  constexpr auto kFloat = PluginFieldType::kFLOAT32;
  constexpr auto kInt = PluginFieldType::kINT32;
  static const std::vector<FieldSpec> table = {
      {"scale", kFloat, true, true, read_scale, view_member<&Attributes::scale>},
      {"probe_tokens", kInt, true, true, read_probe_tokens, view_member<&Attributes::probe_tokens>},
      {"online", kInt, true, true, read_online, view_member<&Attributes::online>},
      {"key_bits", kInt, true, true, read_count<&Attributes::key_bits>, view_member<&Attributes::key_bits>},
      {"value_bits", kInt, true, true, read_count<&Attributes::value_bits>,
       view_member<&Attributes::value_bits>},
      {"group", kInt, true, true, read_count<&Attributes::group>, view_member<&Attributes::group>},
      {"window", kInt, true, true, read_count<&Attributes::window>, view_member<&Attributes::window>},
      {"softcap", kFloat, true, true, read_softcap, view_member<&Attributes::softcap>},
      {kDirectory, PluginFieldType::kCHAR, true, false, read_directory, nullptr},
      {kKernels, PluginFieldType::kUNKNOWN, false, true, read_kernels, view_kernels},
  };
  return table;
}

Attributes read_attributes(const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase) {
  if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr)) {
    throw std::runtime_error("no fields were given");
  }
  const std::vector<FieldSpec>& table = field_table();
  Attributes attributes;
  std::vector<const FieldSpec*> given;
  for (std::int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    const FieldSpec* spec = find(table, field.name);
    if (spec == nullptr) {
      throw std::runtime_error("unknown field '" + std::string(field.name == nullptr ? "" : field.name) +
                               "'");
    }
    if (field.type != spec->type) fail(field, "has the wrong type");
    if (std::find(given.begin(), given.end(), spec) != given.end()) fail(field, "is given twice");
    given.push_back(spec);
    spec->read(field, attributes);
  }
  const bool is_build = phase == nvinfer1::TensorRTPhase::kBUILD;
  for (const FieldSpec& spec : table) {
    // While building, either of the two brings the kernels.
    const bool is_kernels = spec.name == kDirectory || spec.name == kKernels;
    const bool required = is_build ? !is_kernels : spec.serialised;
    if (required && std::find(given.begin(), given.end(), &spec) == given.end()) {
      throw std::runtime_error("field '" + std::string(spec.name) + "' is missing");
    }
  }
  if (attributes.kernels == nullptr) {
    throw std::runtime_error(
        std::string("field '") + kDirectory +
        "' is missing: it names the compiled kernels; `chai-export build --backend tensorrt` "
        "writes it into the model it builds from");
  }
  return attributes;
}

std::vector<PluginField> serialised_fields(const Attributes& attributes) {
  std::vector<PluginField> fields;
  for (const FieldSpec& spec : field_table()) {
    if (spec.serialised) fields.push_back(spec.view(spec, attributes));
  }
  return fields;
}

}  // namespace chai::tensorrt
