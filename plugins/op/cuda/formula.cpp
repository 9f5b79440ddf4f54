#include "op/cuda/formula.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

namespace chai::cuda {
namespace {

constexpr std::size_t kMaxStack = 16;

constexpr std::array<std::string_view, kNumSymbols> kSymbolNames = {
    "B", "S", "H", "G", "D", "Dv", "R", "C", "P", "online", "N", "L", "window"};

}  // namespace

Formula::Formula(std::string_view text) : text_(text) {
  std::size_t depth = 0;
  std::size_t position = 0;
  while ((position = text.find_first_not_of(' ', position)) != std::string_view::npos) {
    const std::size_t end = std::min(text.find(' ', position), text.size());
    const Step step = parse(text.substr(position, end - position));
    const bool is_operand = step.kind == Kind::kConstant || step.kind == Kind::kSymbol;
    if (!is_operand && depth < 2) throw std::runtime_error("formula '" + text_ + "' lacks an operand");
    depth = is_operand ? depth + 1 : depth - 1;
    if (depth > kMaxStack) throw std::runtime_error("formula '" + text_ + "' is too deep");
    steps_.push_back(step);
    position = end;
  }
  if (depth != 1) throw std::runtime_error("formula '" + text_ + "' does not leave one value");
}

Formula::Step Formula::parse(std::string_view token) const {
  static constexpr std::array<std::pair<std::string_view, Kind>, 8> kOperators = {
      {{"+", Kind::kAdd},
       {"-", Kind::kSubtract},
       {"*", Kind::kMultiply},
       {"cdiv", Kind::kCeilDivide},
       {"min", Kind::kMin},
       {"max", Kind::kMax},
       {"<", Kind::kLess},
       {"==", Kind::kEqual}}};
  Step step;
  for (const auto& [name, kind] : kOperators) {
    if (token != name) continue;
    step.kind = kind;
    return step;
  }
  for (std::size_t i = 0; i < kNumSymbols; ++i) {
    if (token != kSymbolNames[i]) continue;
    step.kind = Kind::kSymbol;
    step.symbol = static_cast<Symbol>(i);
    return step;
  }
  const char* end = token.data() + token.size();
  const auto [stop, error] = std::from_chars(token.data(), end, step.constant);
  if (error != std::errc() || stop != end) {
    throw std::runtime_error("formula '" + text_ + "': unknown token '" + std::string(token) + "'");
  }
  return step;
}

std::int64_t Formula::evaluate(const Symbols& symbols) const {
  std::array<std::int64_t, kMaxStack> stack{};
  std::size_t depth = 0;
  for (const Step& step : steps_) {
    if (step.kind == Kind::kConstant) {
      stack[depth++] = step.constant;
    } else if (step.kind == Kind::kSymbol) {
      stack[depth++] = symbols[step.symbol];
    } else {
      --depth;
      stack[depth - 1] = apply(step.kind, stack[depth - 1], stack[depth]);
    }
  }
  return stack[0];
}

std::int64_t Formula::apply(Kind kind, std::int64_t left, std::int64_t right) const {
  std::int64_t result = 0;
  bool overflow = false;
  switch (kind) {
    case Kind::kAdd:
      overflow = __builtin_add_overflow(left, right, &result);
      break;
    case Kind::kSubtract:
      overflow = __builtin_sub_overflow(left, right, &result);
      break;
    case Kind::kMultiply:
      overflow = __builtin_mul_overflow(left, right, &result);
      break;
    case Kind::kCeilDivide:
      if (right < 1) throw std::runtime_error("formula '" + text_ + "' divides by " + std::to_string(right));
      return left / right + (left % right > 0 ? 1 : 0);
    case Kind::kMin:
      return std::min(left, right);
    case Kind::kMax:
      return std::max(left, right);
    case Kind::kLess:
      return left < right ? 1 : 0;
    case Kind::kEqual:
      return left == right ? 1 : 0;
    case Kind::kConstant:
    case Kind::kSymbol:
      break;  // not operators
  }
  if (overflow) throw std::runtime_error("formula '" + text_ + "' exceeds 64 bits");
  return result;
}

}  // namespace chai::cuda
