// JSON documents, read strictly: nothing is converted, and what is missing or of another kind is named by its
// place.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace chai {

// A value of a document, which lives as long as any of its values. Methods that ask for a kind of value throw
// std::runtime_error if it is another one.
class Json {
 public:
  enum class Kind { kNull, kBoolean, kInteger, kNumber, kString, kArray, kObject };

  // Throws std::runtime_error if the text is not JSON, or is nested more than 100 deep.
  static Json parse(std::string_view text);

  Kind kind() const;  // kInteger: no fraction, no exponent, 64 bits

  std::int64_t integer() const;
  double real() const;  // of an integer too
  const std::string& string() const;
  std::vector<Json> array() const;
  std::vector<std::pair<std::string, Json>> members() const;
  Json at(const std::string& name) const;
  // The member of this name, unless there is none or it is null.
  std::optional<Json> find(const std::string& name) const;
  std::string text() const;  // the value as JSON, in one line

  // Throws std::runtime_error: the value's place in the document and what is wrong with it, in one line.
  [[noreturn]] void refuse(const std::string& problem) const;

 private:
  Json(std::shared_ptr<const void> value, std::string place)
      : value_(std::move(value)), place_(std::move(place)) {}
  Json part(const void* value, const std::string& name) const;
  void require(bool fits, const char* expected) const;

  std::shared_ptr<const void> value_;  // the library's value; owns the document
  std::string place_;
};

}  // namespace chai
