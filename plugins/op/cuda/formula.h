// Formulas of the kernel index: reverse Polish notation over the sizes of one call, 64-bit integers.
//
// "S 64 cdiv" is ceil(S / 64). chai_export/kernels/formula.py defines the same language.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace chai::cuda {

// What a formula may name, in this order: the sizes of the op, the attribute `online`,
// pages in the pools (N), positions per page (L) and the attribute `window`.
enum class Symbol : std::size_t { kB, kS, kH, kG, kD, kDv, kR, kC, kP, kOnline, kN, kL, kWindow, kCount };
constexpr std::size_t kNumSymbols = static_cast<std::size_t>(Symbol::kCount);

class Symbols {
 public:
  std::int64_t& operator[](Symbol symbol) { return values_[static_cast<std::size_t>(symbol)]; }
  std::int64_t operator[](Symbol symbol) const { return values_[static_cast<std::size_t>(symbol)]; }
  bool operator==(const Symbols& other) const { return values_ == other.values_; }
  bool operator!=(const Symbols& other) const { return values_ != other.values_; }

 private:
  std::array<std::int64_t, kNumSymbols> values_{};
};

class Formula {
 public:
  // Throws std::runtime_error on an unknown token or when operators and operands do not match.
  explicit Formula(std::string_view text);

  // Throws std::runtime_error on overflow or a division by less than 1.
  std::int64_t evaluate(const Symbols& symbols) const;

 private:
  enum class Kind { kConstant, kSymbol, kAdd, kSubtract, kMultiply, kCeilDivide, kMin, kMax, kLess, kEqual };
  struct Step {
    Kind kind = Kind::kConstant;
    std::int64_t constant = 0;
    Symbol symbol = Symbol::kB;
  };

  Step parse(std::string_view token) const;
  std::int64_t apply(Kind kind, std::int64_t left, std::int64_t right) const;

  std::string text_;
  std::vector<Step> steps_;
};

}  // namespace chai::cuda
