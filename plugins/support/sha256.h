// SHA-256 (FIPS 180-4): kernels are recognised by it, and damaged ones are refused.
#pragma once

#include <string>
#include <string_view>

namespace chai {

// 64 lower-case hexadecimal digits.
std::string sha256_hex(std::string_view bytes);

}  // namespace chai
