// The index of the GPU kernels as launches, and the image that carries them in an engine. No toolkit, no GPU.
#include "op/cuda/program.h"

#include <doctest/doctest.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>

#include "op/cuda/kernel_image.h"
#include "support/sha256.h"
#include "tests/op/cuda/fixtures.h"

namespace chai::cuda::test {
namespace {

// Sizes that the kernels of kIndex take.
Symbols sizes(std::int64_t tokens, std::int64_t kept = 1) {
  Symbols symbols;
  const std::map<Symbol, std::int64_t> values = {
      {Symbol::kB, 2},  {Symbol::kS, tokens}, {Symbol::kH, 4},    {Symbol::kG, 2},  {Symbol::kD, 16},
      {Symbol::kDv, 8}, {Symbol::kP, 5},      {Symbol::kR, kept}, {Symbol::kC, 64}, {Symbol::kOnline, 1}};
  for (const auto& [symbol, value] : values) symbols[symbol] = value;
  return symbols;
}

TEST_CASE("formulas evaluate as Python's do") {
  Symbols symbols;
  symbols[Symbol::kS] = 130;
  symbols[Symbol::kB] = 3;
  symbols[Symbol::kOnline] = 1;
  const std::map<std::string, std::int64_t> values = {
      {"S 64 cdiv", 3},     {"S B -", 127}, {"1 S <", 1},         {"S 1 ==", 0},
      {"S B min 7 max", 7}, {"-5 B +", -2}, {"online 1 B < *", 1}};
  for (const auto& [text, value] : values) CHECK(Formula(text).evaluate(symbols) == value);
  for (const char* wrong : {"", "S B", "S +", "S B /", "X", "1 2 + +", "9999999999999999999999"}) {
    CAPTURE(wrong);
    CHECK_THROWS_AS(Formula{wrong}, std::runtime_error);
  }
  for (const char* wrong : {"S 0 cdiv", "9223372036854775807 B *"}) {
    CAPTURE(wrong);
    CHECK_THROWS_AS(Formula(wrong).evaluate(symbols), std::runtime_error);
  }
}

TEST_CASE("a plan lists the launches that apply, with grid and workspace") {
  const Program program = Program::parse(kIndex);
  CHECK(program.spec().dtype == "float16");
  CHECK(program.spec().architecture == 90);
  CHECK(program.spec().key_bits == 8);
  CHECK(program.spec().value_bits == 4);
  CHECK(program.spec().group == 8);
  CHECK(program.spec().sinks);
  CHECK_FALSE(program.spec().slopes);
  CHECK(program.pointer_alignment() == 16);
  // plan: 2*2 int32; weights: 2*64 float16; each rounded up to 256 bytes.
  CHECK(program.workspace_bytes(sizes(7)) == 512);
  const Plan prefill = program.plan(sizes(7));
  REQUIRE(prefill.size() == 1);
  CHECK(prefill[0].kernel == 0);
  CHECK(prefill[0].size.grid == std::array<std::uint32_t, 3>{2, 4, 2});
  const Plan decode = program.plan(sizes(1, 2));
  REQUIRE(decode.size() == 1);
  CHECK(decode[0].kernel == 1);
  CHECK(decode[0].size.grid == std::array<std::uint32_t, 3>{4, 2, 2});
}

TEST_CASE("a plan is launched with the addresses and values of a call") {
  const Program program = Program::parse(kIndex);
  RecordingLauncher recorder(kArgumentCounts);
  Tensors tensors{};
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = reinterpret_cast<void*>((i + 1) << 20);
  void* const workspace = reinterpret_cast<void*>(std::uint64_t{1} << 40);
  run(program.plan(sizes(7)), tensors, workspace, {0.25f, 0.0f}, recorder, nullptr);
  REQUIRE(recorder.launches.size() == 1);
  const auto& launch = recorder.launches[0];
  CHECK(launch.size.threads == 128);
  CHECK(launch.size.shared_bytes == 70000);
  CHECK(launch.arguments[0] == std::uint64_t{1} << 20);          // query
  CHECK(launch.arguments[1] == (std::uint64_t{1} << 40) + 256);  // the second section
  CHECK(launch.arguments[2] == 64);                              // C
  float scale = 0.0f;
  std::memcpy(&scale, &launch.arguments[3], sizeof(scale));
  CHECK(scale == 0.25f);
  CHECK(launch.arguments[4] == (static_cast<std::uint64_t>(Tensor::kKeyCache) + 1) << 20);  // the pool
  CHECK(launch.arguments[5] == 0);                                                          // hidden
  recorder.refuses = true;
  CHECK_THROWS_AS(run(program.plan(sizes(1)), tensors, workspace, {}, recorder, nullptr), std::runtime_error);
}

TEST_CASE("sizes that no GPU can launch are refused") {
  const Program program = Program::parse(kIndex);
  Symbols many = sizes(7);
  many[Symbol::kB] = 65536;
  CHECK_THROWS_WITH_AS(
      program.plan(many),
      "several needs a grid of 65536 blocks on axis 2, which no GPU has; lower the batch or the length",
      std::runtime_error);
  Symbols huge = sizes(7);
  huge[Symbol::kC] = std::int64_t{1} << 62;
  CHECK_THROWS_AS(program.workspace_bytes(huge), std::runtime_error);
}

TEST_CASE("an image holds the files of its directory, and equal images are one") {
  const KernelDirectory directory;
  const auto image = KernelImage::from_directory(directory.path());
  CHECK(image->file("one.cubin") == "code of one");
  CHECK(image->file("several.cubin") == "code of several");
  CHECK(KernelImage::from_bytes(image->bytes()).get() == image.get());
  CHECK(KernelImage::from_directory(directory.path()).get() == image.get());
  CHECK_THROWS_AS(image->file("other"), std::runtime_error);
}

TEST_CASE("a damaged image is refused") {
  const std::string image = KernelImage::from_directory(KernelDirectory().path())->bytes();
  for (std::size_t cut = 0; cut < image.size(); cut += 13)
    CHECK_THROWS_AS(KernelImage::from_bytes(image.substr(0, cut)), std::runtime_error);
  for (std::size_t place = 0; place < image.size(); place += 7) {
    std::string changed = image;
    changed[place] = static_cast<char>(changed[place] ^ 0x20);
    CHECK_THROWS_AS(KernelImage::from_bytes(changed), std::runtime_error);
  }
  CHECK_THROWS_AS(KernelImage::from_bytes(image + "x"), std::runtime_error);
  // Damaged behind a hash that is right: sizes that lead out of the image.
  std::string content = image.substr(0, image.size() - 64);
  content[12] = '\xff';
  content[14] = '\xff';
  CHECK_THROWS_AS(KernelImage::from_bytes(content + sha256_hex(content)), std::runtime_error);
}

TEST_CASE("a damaged directory is refused") {
  const auto refused = [](const char* part, const std::string& path) {
    CAPTURE(part);
    CHECK_THROWS_WITH_AS(KernelImage::from_directory(path), doctest::Contains(part), std::runtime_error);
  };
  refused("cannot read /nowhere/index.json", "/nowhere");
  const KernelDirectory directory;
  directory.write("one.cubin", "other code");
  refused("is not the file the index was written for", directory.path());
  std::remove(directory.file("one.cubin").c_str());
  refused("one.cubin; compile the kernels again", directory.path());
  // Every cut and many changes of the index: an error, never a crash.
  const std::string index = kIndex;
  for (std::size_t cut = 0; cut < index.size(); cut += 29)
    refused("", KernelDirectory(index.substr(0, cut)).path());
  for (const auto& [from, to] : kIndexDamages) {
    std::string changed = index;
    changed.replace(changed.find(from), from.size(), to);
    refused("", KernelDirectory(changed).path());
  }
}

}  // namespace
}  // namespace chai::cuda::test
