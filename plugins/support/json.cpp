#include "support/json.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace chai {
namespace {

using Value = nlohmann::json;

const Value& value_of(const std::shared_ptr<const void>& value) {
  return *static_cast<const Value*>(value.get());
}

}  // namespace

Json Json::parse(std::string_view text) {
  try {
    return Json(std::make_shared<const Value>(Value::parse(text)), "");
  } catch (const Value::exception& error) {
    const std::string_view what = error.what();  // "[json.exception.parse_error.101] parse error at …"
    throw std::runtime_error("JSON: " + std::string(what.substr(what.find("] ") + 2)));
  }
}

void Json::refuse(const char* expected) const {
  throw std::runtime_error("JSON, '" + place_ + "': expected " + expected);
}

Json Json::part(const void* value, const std::string& name) const {
  return Json(std::shared_ptr<const void>(value_, value), place_ + "/" + name);
}

std::int64_t Json::integer() const {
  const Value& value = value_of(value_);
  const bool fits = !value.is_number_unsigned() ||
                    value.get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<std::int64_t>::max()};
  if (!value.is_number_integer() || !fits) refuse("an integer");
  return value.get<std::int64_t>();
}

double Json::real() const {
  const Value& value = value_of(value_);
  if (!value.is_number()) refuse("a number");
  return value.get<double>();
}

const std::string& Json::string() const {
  const Value& value = value_of(value_);
  if (!value.is_string()) refuse("a string");
  return value.get_ref<const std::string&>();
}

std::vector<Json> Json::array() const {
  const Value& value = value_of(value_);
  if (!value.is_array()) refuse("an array");
  std::vector<Json> items;
  for (const Value& item : value) items.push_back(part(&item, std::to_string(items.size())));
  return items;
}

std::vector<std::pair<std::string, Json>> Json::members() const {
  const Value& value = value_of(value_);
  if (!value.is_object()) refuse("an object");
  std::vector<std::pair<std::string, Json>> members;
  for (const auto& [name, member] : value.items()) members.emplace_back(name, part(&member, name));
  return members;
}

Json Json::at(const std::string& name) const {
  const Value& value = value_of(value_);
  if (!value.is_object()) refuse("an object");
  const auto member = value.find(name);
  if (member == value.end())
    throw std::runtime_error("JSON, '" + place_ + "': member '" + name + "' is missing");
  return part(&*member, name);
}

std::optional<Json> Json::find(const std::string& name) const {
  const Value& value = value_of(value_);
  if (!value.is_object()) refuse("an object");
  const auto member = value.find(name);
  if (member == value.end() || member->is_null()) return std::nullopt;
  return part(&*member, name);
}

}  // namespace chai
