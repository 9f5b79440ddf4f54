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

// A value of a document, which lives as long as any of its values. Every method throws std::runtime_error.
class Json {
 public:
  static Json parse(std::string_view text);

  std::int64_t integer() const;  // no fraction, no exponent
  double real() const;           // of an integer too
  const std::string& string() const;
  std::vector<Json> array() const;
  std::vector<std::pair<std::string, Json>> members() const;
  Json at(const std::string& name) const;
  // The member of this name, unless there is none or it is null.
  std::optional<Json> find(const std::string& name) const;

 private:
  Json(std::shared_ptr<const void> value, std::string place)
      : value_(std::move(value)), place_(std::move(place)) {}
  Json part(const void* value, const std::string& name) const;
  [[noreturn]] void refuse(const char* expected) const;

  std::shared_ptr<const void> value_;  // the library's value; owns the document
  std::string place_;
};

}  // namespace chai
