#include "support/json.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace chai {
namespace {

using Value = nlohmann::json;

constexpr int kMostDepth = 100;

const Value& value_of(const std::shared_ptr<const void>& value) {
  return *static_cast<const Value*>(value.get());
}

std::string one_line(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < ' ') c = ' ';
  return text;
}

}  // namespace

Json Json::parse(std::string_view text) {
  const auto shallow = [](int depth, Value::parse_event_t, const Value&) {
    if (depth > kMostDepth)
      throw std::runtime_error("JSON: nested more than " + std::to_string(kMostDepth) + " deep");
    return true;
  };
  try {
    return Json(std::make_shared<const Value>(Value::parse(text, shallow)), "");
  } catch (const Value::exception& error) {
    const std::string_view what = error.what();  // "[json.exception.parse_error.101] parse error at …"
    throw std::runtime_error("JSON: " + one_line(std::string(what.substr(what.find("] ") + 2))));
  }
}

void Json::refuse(const std::string& problem) const {
  throw std::runtime_error(one_line("JSON, '" + place_ + "': " + problem));
}

void Json::require(bool fits, const char* expected) const {
  if (!fits) refuse(std::string("expected ") + expected);
}

Json::Kind Json::kind() const {
  const Value& value = value_of(value_);
  switch (value.type()) {
    case Value::value_t::boolean:
      return Kind::kBoolean;
    case Value::value_t::number_integer:
      return Kind::kInteger;
    case Value::value_t::number_unsigned:
      return value.get<std::uint64_t>() <= std::numeric_limits<std::int64_t>::max() ? Kind::kInteger
                                                                                    : Kind::kNumber;
    case Value::value_t::number_float:
      return Kind::kNumber;
    case Value::value_t::string:
      return Kind::kString;
    case Value::value_t::array:
      return Kind::kArray;
    case Value::value_t::object:
      return Kind::kObject;
    default:
      return Kind::kNull;
  }
}

std::string Json::text() const {
  return value_of(value_).dump();
}

Json Json::part(const void* value, const std::string& name) const {
  return Json(std::shared_ptr<const void>(value_, value), place_ + "/" + name);
}

std::int64_t Json::integer() const {
  require(kind() == Kind::kInteger, "an integer");
  return value_of(value_).get<std::int64_t>();
}

double Json::real() const {
  const Value& value = value_of(value_);
  require(value.is_number(), "a number");
  return value.get<double>();
}

const std::string& Json::string() const {
  const Value& value = value_of(value_);
  require(value.is_string(), "a string");
  return value.get_ref<const std::string&>();
}

std::vector<Json> Json::array() const {
  const Value& value = value_of(value_);
  require(value.is_array(), "an array");
  std::vector<Json> items;
  for (const Value& item : value) items.push_back(part(&item, std::to_string(items.size())));
  return items;
}

std::vector<std::pair<std::string, Json>> Json::members() const {
  const Value& value = value_of(value_);
  require(value.is_object(), "an object");
  std::vector<std::pair<std::string, Json>> members;
  for (const auto& [name, member] : value.items()) members.emplace_back(name, part(&member, name));
  return members;
}

Json Json::at(const std::string& name) const {
  const Value& value = value_of(value_);
  require(value.is_object(), "an object");
  const auto member = value.find(name);
  if (member == value.end()) refuse("member '" + name + "' is missing");
  return part(&*member, name);
}

std::optional<Json> Json::find(const std::string& name) const {
  const Value& value = value_of(value_);
  require(value.is_object(), "an object");
  const auto member = value.find(name);
  if (member == value.end() || member->is_null()) return std::nullopt;
  return part(&*member, name);
}

}  // namespace chai
