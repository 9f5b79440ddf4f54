#include "json.h"

#include <cctype>
#include <charconv>
#include <cstddef>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace chai {
namespace {

// Deeper documents than any index: a bound that keeps damaged input from exhausting the stack.
constexpr int kMaxDepth = 32;

}  // namespace

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json root = value("", 0);
    skip_space();
    if (position_ != text_.size()) fail("text after the end of the document");
    return root;
  }

 private:
  [[noreturn]] void fail(const std::string& reason) const {
    throw std::runtime_error("JSON, byte " + std::to_string(position_) + ": " + reason);
  }

  void skip_space() {
    while (position_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[position_])))
      ++position_;
  }

  char peek() {
    skip_space();
    if (position_ >= text_.size()) fail("unexpected end");
    return text_[position_];
  }

  void expect(char wanted) {
    if (peek() != wanted) fail(std::string("expected '") + wanted + "'");
    ++position_;
  }

  bool accept(char wanted) {
    if (peek() != wanted) return false;
    ++position_;
    return true;
  }

  Json value(const std::string& place, int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    Json result;
    result.place_ = place;
    const char first = peek();
    if (first == '{') {
      object(result, depth);
    } else if (first == '[') {
      array(result, depth);
    } else if (first == '"') {
      result.kind_ = Json::Kind::kString;
      result.text_ = string();
    } else if (first == 't' || first == 'f' || first == 'n') {
      literal(result);
    } else {
      number(result);
    }
    return result;
  }

  void object(Json& result, int depth) {
    result.kind_ = Json::Kind::kObject;
    expect('{');
    if (accept('}')) return;
    do {
      if (peek() != '"') fail("expected a member's name");
      result.names_.push_back(string());
      expect(':');
      result.values_.push_back(value(result.place_ + "/" + result.names_.back(), depth + 1));
    } while (accept(','));
    expect('}');
  }

  void array(Json& result, int depth) {
    result.kind_ = Json::Kind::kArray;
    expect('[');
    if (accept(']')) return;
    do {
      const std::string place = result.place_ + "/" + std::to_string(result.values_.size());
      result.values_.push_back(value(place, depth + 1));
    } while (accept(','));
    expect(']');
  }

  void literal(Json& result) {
    for (const std::string_view word : {"true", "false", "null"}) {
      if (text_.substr(position_, word.size()) != word) continue;
      position_ += word.size();
      result.kind_ = word == "null" ? Json::Kind::kNull : Json::Kind::kBoolean;
      result.integer_ = word == "true" ? 1 : 0;
      return;
    }
    fail("unknown word");
  }

  void number(Json& result) {
    const std::size_t start = position_;
    while (position_ < text_.size() &&
           std::string_view("+-.0123456789eE").find(text_[position_]) != std::string_view::npos) {
      ++position_;
    }
    const std::string_view digits = text_.substr(start, position_ - start);
    const char* end = digits.data() + digits.size();
    const auto [stop, error] = std::from_chars(digits.data(), end, result.integer_);
    if (error == std::errc() && stop == end) {
      result.kind_ = Json::Kind::kInteger;
    } else if (!digits.empty() && error != std::errc::result_out_of_range) {
      result.kind_ = Json::Kind::kReal;
      result.text_ = digits;
    } else {
      fail("expected a value");
    }
  }

  std::string string() {
    expect('"');
    std::string result;
    while (true) {
      if (position_ >= text_.size()) fail("unterminated string");
      const char c = text_[position_++];
      if (c == '"') return result;
      result += c == '\\' ? escape() : c;
    }
  }

  // Writers of our files leave UTF-8 as it is and escape control characters only.
  char escape() {
    if (position_ >= text_.size()) fail("unterminated string");
    const char c = text_[position_++];
    switch (c) {
      case 'b':
        return '\b';
      case 'f':
        return '\f';
      case 'u':
        return code_point();
      case 'n':
        return '\n';
      case 't':
        return '\t';
      case 'r':
        return '\r';
      case '"':
      case '\\':
      case '/':
        return c;
      default:
        fail("escape that is not supported");
    }
  }

  char code_point() {
    const std::string_view digits = text_.substr(position_, 4);
    unsigned value = 0;
    const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    if (digits.size() != 4 || error != std::errc() || stop != digits.data() + 4 || value > 127)
      fail("escape that is not supported");
    position_ += 4;
    return static_cast<char>(value);
  }

  std::string_view text_;
  std::size_t position_ = 0;
};

Json Json::parse(std::string_view text) {
  return JsonParser(text).document();
}

void Json::require(Kind kind, const char* what) const {
  if (kind_ != kind) throw std::runtime_error("JSON, '" + place_ + "': expected " + what);
}

std::int64_t Json::integer() const {
  require(Kind::kInteger, "an integer");
  return integer_;
}

double Json::real() const {
  if (kind_ == Kind::kInteger) return static_cast<double>(integer_);
  require(Kind::kReal, "a number");
  std::istringstream stream(text_);
  stream.imbue(std::locale::classic());  // a decimal point whatever the program's locale
  double value = 0.0;
  stream >> value;
  return value;
}

const std::string& Json::string() const {
  require(Kind::kString, "a string");
  return text_;
}

const std::vector<Json>& Json::array() const {
  require(Kind::kArray, "an array");
  return values_;
}

const Json* Json::find(std::string_view name) const {
  require(Kind::kObject, "an object");
  for (std::size_t i = 0; i < names_.size(); ++i) {
    if (names_[i] == name) return &values_[i];
  }
  return nullptr;
}

const Json& Json::at(std::string_view name) const {
  const Json* member = find(name);
  if (member == nullptr)
    throw std::runtime_error("JSON, '" + place_ + "': member '" + std::string(name) + "' is missing");
  return *member;
}

const std::vector<std::string>& Json::names() const {
  require(Kind::kObject, "an object");
  return names_;
}

const std::vector<Json>& Json::values() const {
  require(Kind::kObject, "an object");
  return values_;
}

}  // namespace chai
