#include "support/json_schema.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace chai {
namespace {

using Kind = Json::Kind;

struct Type {
  const char* name;
  const char* article;
  std::vector<Kind> kinds;
};

const Type& type_named(const std::string& name) {
  static const std::vector<Type> types = {{"null", "null", {Kind::kNull}},
                                          {"boolean", "true or false", {Kind::kBoolean}},
                                          {"integer", "an integer", {Kind::kInteger}},
                                          {"number", "a number", {Kind::kInteger, Kind::kNumber}},
                                          {"string", "a string", {Kind::kString}},
                                          {"array", "an array", {Kind::kArray}},
                                          {"object", "an object", {Kind::kObject}}};
  return *std::find_if(types.begin(), types.end(), [&](const Type& type) { return name == type.name; });
}

void check_type(const Json& value, const std::string& name) {
  const Type& type = type_named(name);
  if (std::find(type.kinds.begin(), type.kinds.end(), value.kind()) == type.kinds.end())
    value.refuse(std::string("expected ") + type.article);
}

void check_allowed(const Json& value, const std::vector<Json>& allowed) {
  for (const Json& one : allowed)
    if (value.text() == one.text()) return;
  std::string all;
  for (const Json& one : allowed) all += (all.empty() ? "" : " or ") + one.text();
  value.refuse(value.text() + " is not " + all);
}

// The first alternative is what most values are, the others exceptions such as null: its error says more.
void check_any(const Json& value, const std::vector<Json>& alternatives) {
  std::string first;
  for (const Json& alternative : alternatives) {
    try {
      return check_schema(value, alternative);
    } catch (const std::runtime_error& error) {
      if (first.empty()) first = error.what();
    }
  }
  throw std::runtime_error(first);
}

void check_range(const Json& value, const Json& schema) {
  const auto least = schema.find("minimum");
  const auto most = schema.find("maximum");
  if (least && value.real() < least->real()) value.refuse(value.text() + " is less than " + least->text());
  if (most && value.real() > most->real()) value.refuse(value.text() + " is more than " + most->text());
}

// Of the one form that our schemas have, a number of characters of a set: "^[0-9a-f]{64}$".
bool matches(const std::string& text, const std::string& pattern) {
  const std::size_t end = pattern.find(']');
  const std::string set = pattern.substr(2, end - 2);
  if (text.size() != std::stoul(pattern.substr(end + 2))) return false;
  return std::all_of(text.begin(), text.end(), [&](char c) {
    for (std::size_t i = 0; i + 2 < set.size(); i += 3)
      if (set[i] <= c && c <= set[i + 2]) return true;
    return false;
  });
}

bool is_among(const std::string& name, const std::vector<Json>& allowed) {
  return std::any_of(allowed.begin(), allowed.end(), [&](const Json& one) { return one.string() == name; });
}

void check_members(const Json& value, const Json& schema) {
  const auto known = schema.find("properties");
  const auto others = schema.find("additionalProperties");
  const auto names = schema.find("propertyNames");
  for (const auto& [name, member] : value.members()) {
    if (names && !is_among(name, names->at("enum").array())) value.refuse("member '" + name + "' is unknown");
    const auto property = known ? known->find(name) : std::nullopt;
    if (property) {
      check_schema(member, *property);
    } else if (others && others->kind() == Kind::kObject) {
      check_schema(member, *others);
    } else if (others) {
      value.refuse("member '" + name + "' is unknown");
    }
  }
  if (const auto required = schema.find("required"))
    for (const Json& name : required->array()) static_cast<void>(value.at(name.string()));
}

}  // namespace

void check_schema(const Json& value, const Json& schema) {
  if (const auto alternatives = schema.find("anyOf")) return check_any(value, alternatives->array());
  if (const auto type = schema.find("type")) check_type(value, type->string());
  if (const auto allowed = schema.find("enum")) check_allowed(value, allowed->array());
  if (const auto only = schema.find("const")) check_allowed(value, {*only});
  const Kind kind = value.kind();
  if (kind == Kind::kInteger || kind == Kind::kNumber) check_range(value, schema);
  if (kind == Kind::kObject) check_members(value, schema);
  if (const auto items = schema.find("items"))
    for (const Json& item : value.array()) check_schema(item, *items);
  if (const auto pattern = schema.find("pattern"))
    if (!matches(value.string(), pattern->string())) value.refuse("it does not match " + pattern->string());
}

}  // namespace chai
