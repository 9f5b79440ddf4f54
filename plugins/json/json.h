// The part of JSON that the kernel index and manifest.json use, for reading. Anything malformed throws
// std::runtime_error.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace chai {

class Json {
 public:
  static Json parse(std::string_view text);

  bool is_null() const { return kind_ == Kind::kNull; }
  // Each throws, naming the value's place in the document, when the value is of another kind.
  std::int64_t integer() const;
  double real() const;  // of an integer too
  const std::string& string() const;
  const std::vector<Json>& array() const;
  const Json& at(std::string_view name) const;
  // The member of this name, or null.
  const Json* find(std::string_view name) const;
  // Names of an object's members, parallel to values().
  const std::vector<std::string>& names() const;
  const std::vector<Json>& values() const;

 private:
  enum class Kind { kNull, kBoolean, kInteger, kReal, kString, kArray, kObject };
  friend class JsonParser;

  void require(Kind kind, const char* what) const;

  Kind kind_ = Kind::kNull;
  std::int64_t integer_ = 0;
  std::string text_;  // of a string, or a number that is not an integer
  std::vector<std::string> names_;
  std::vector<Json> values_;
  std::string place_;
};

}  // namespace chai
