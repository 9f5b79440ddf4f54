// What the native libraries share: JSON, SHA-256, 16-bit floats.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "support/half.h"
#include "support/json.h"
#include "support/sha256.h"

namespace {

using chai::Json;

TEST_CASE("JSON is read as it is written, and values name their place") {
  const Json json =
      Json::parse(R"({"a": [1, 2.5, 9223372036854775807], "b": "caf\u00e9 \ud83d\ude00", "c": null})");
  CHECK(json.at("a").array()[0].integer() == 1);
  CHECK(json.at("a").array()[0].real() == 1.0);
  CHECK(json.at("a").array()[1].real() == 2.5);
  CHECK(json.at("a").array()[2].integer() == std::numeric_limits<std::int64_t>::max());
  CHECK(json.at("b").string() == "caf\xc3\xa9 \xf0\x9f\x98\x80");
  CHECK_FALSE(json.find("c").has_value());
  CHECK_FALSE(json.find("d").has_value());
  CHECK(json.members().size() == 3);
  CHECK_THROWS_WITH_AS(json.at("a").array()[1].integer(), "JSON, '/a/1': expected an integer",
                       std::runtime_error);
  CHECK_THROWS_WITH_AS(json.at("b").array(), "JSON, '/b': expected an array", std::runtime_error);
  CHECK_THROWS_WITH_AS(json.at("c").string(), "JSON, '/c': expected a string", std::runtime_error);
  CHECK_THROWS_WITH_AS(json.at("d"), "JSON, '': member 'd' is missing", std::runtime_error);
  CHECK_THROWS_WITH_AS(json.at("a").at("d"), "JSON, '/a': expected an object", std::runtime_error);
}

TEST_CASE("nothing is converted to a number") {
  for (const char* text : {"true", "\"1\"", "null", "1.0", "1e3", "9223372036854775808", "[1]"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(Json::parse(text).integer(), std::runtime_error);
  }
  for (const char* text : {"true", "\"1\"", "null"})
    CHECK_THROWS_AS(Json::parse(text).real(), std::runtime_error);
}

TEST_CASE("what is not JSON is refused") {
  for (const char* text :
       {"", "{", "[1,]", "{} x", "1.2.3", "--5", "e", "007", "NaN", "\"\\x\"", "\"\xff\"", "1e999"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(Json::parse(text), std::runtime_error);
  }
  CHECK_THROWS_AS(Json::parse(std::string(1000000, '[')), std::runtime_error);
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  CHECK_THROWS_AS(Json::parse(deep).integer(), std::runtime_error);
}

TEST_CASE("SHA-256 knows its test vectors") {
  CHECK(chai::sha256_hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(chai::sha256_hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(chai::sha256_hex(std::string(64, 'a')) ==
        "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb");
  CHECK(chai::sha256_hex(std::string(1000, 'x')).size() == 64);
}

TEST_CASE("every 16-bit float survives the way to float and back") {
  bool halves = true;
  bool bfloats = true;
  for (std::uint32_t i = 0; i < 0x10000; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const bool nan = std::isnan(chai::half_to_float(bits));
    halves = halves &&
             (nan ? (bits & 0x7fffu) > 0x7c00u : chai::half_from_float(chai::half_to_float(bits)) == bits);
    const bool bnan = std::isnan(chai::bfloat16_to_float(bits));
    bfloats = bfloats && (bnan ? (bits & 0x7fffu) > 0x7f80u
                               : chai::bfloat16_from_float(chai::bfloat16_to_float(bits)) == bits);
  }
  CHECK(halves);
  CHECK(bfloats);
  CHECK(chai::half_to_float(0x3c00) == 1.0f);
  CHECK(chai::half_to_float(0x0001) == std::ldexp(1.0f, -24));
  CHECK(chai::half_to_float(0xfc00) == -std::numeric_limits<float>::infinity());
  CHECK(chai::bfloat16_to_float(0xc040) == -3.0f);
}

TEST_CASE("floats round to the nearest 16-bit float, ties to even") {
  CHECK(chai::half_from_float(1.0f + std::ldexp(1.0f, -11)) == 0x3c00);
  CHECK(chai::half_from_float(1.0f + std::ldexp(3.0f, -11)) == 0x3c02);
  CHECK(chai::half_from_float(std::ldexp(1.0f, -25)) == 0x0000);
  CHECK(chai::half_from_float(std::ldexp(3.0f, -25)) == 0x0002);
  CHECK(chai::half_from_float(65519.0f) == 0x7bff);
  CHECK(chai::half_from_float(65520.0f) == 0x7c00);
  CHECK(chai::bfloat16_from_float(1.0f + std::ldexp(1.0f, -8)) == 0x3f80);
  CHECK(chai::bfloat16_from_float(1.0f + std::ldexp(3.0f, -8)) == 0x3f82);
  CHECK(std::isnan(chai::half_to_float(chai::half_from_float(std::nanf("")))));
  CHECK(std::isnan(chai::bfloat16_to_float(chai::bfloat16_from_float(std::nanf("")))));
}

}  // namespace
