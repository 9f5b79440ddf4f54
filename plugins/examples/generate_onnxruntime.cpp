// Greedy text from a bundle on ONNX Runtime, token ids in and out:
//
//   generate_onnxruntime BUNDLE 64 17,4,256,9 5,9
//
// prints up to 64 new token ids for each of the prompts 17 4 256 9 and 5 9, a line for each.
// `chai-export run BUNDLE --token-ids 17,4,256,9 --json` prints the same ids. Before BUNDLE may stand
//   --all-heads         run the same graph as plain attention
//   --op-library FILE   libchai_onnxruntime.so, where it does not lie beside libchai_runtime.so
//   --function-body     run without it
//   --cache-memory N    bytes that the KV caches may take
// CHAI_ONNXRUNTIME_LIBRARY in the environment names libonnxruntime.so where the loader does not find one.
#include <chai/runner.h>

#include <cstdint>
#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::int64_t number(const std::string& text) {
  std::size_t used = 0;
  std::int64_t value = -1;
  try {
    value = std::stoll(text, &used);
  } catch (const std::logic_error&) {
    used = 0;
  }
  if (used == 0 || used != text.size()) throw std::runtime_error("'" + text + "' is not a number");
  return value;
}

std::vector<std::int64_t> ids(const std::string& text) {
  std::vector<std::int64_t> result;
  std::istringstream stream(text);
  for (std::string id; std::getline(stream, id, ',');) result.push_back(number(id));
  return result;
}

void generate(std::vector<std::string> arguments) {
  chai::Options options;
  while (!arguments.empty() && arguments[0].rfind("--", 0) == 0) {
    std::size_t used = 1;
    if (arguments[0] == "--all-heads") {
      options.heads = chai::Heads::kAll;
    } else if (arguments[0] == "--function-body") {
      options.op_library = "";
    } else if (arguments[0] == "--op-library" && arguments.size() > 1) {
      options.op_library = arguments[1];
      used = 2;
    } else if (arguments[0] == "--cache-memory" && arguments.size() > 1) {
      options.cache_memory = number(arguments[1]);
      used = 2;
    } else {
      throw std::runtime_error("unknown option " + arguments[0]);
    }
    arguments.erase(arguments.begin(), arguments.begin() + static_cast<std::ptrdiff_t>(used));
  }
  if (arguments.size() < 3)
    throw std::runtime_error("usage: generate_onnxruntime [OPTIONS] BUNDLE NEW_TOKENS TOKEN_ID,TOKEN_ID,… …");

  chai::GenerateOptions settings;
  settings.max_new_tokens = number(arguments[1]);
  std::vector<std::vector<std::int64_t>> prompts;
  for (std::size_t i = 2; i < arguments.size(); ++i) prompts.push_back(ids(arguments[i]));

  chai::Runner runner = chai::Runner::open(arguments[0], options);
  // One prompt is shown as it is made; several would mix.
  const bool streams = prompts.size() == 1;
  const auto generations = runner.generate(prompts, settings, [&](std::size_t, std::int64_t token) {
    if (streams) std::cout << token << ' ' << std::flush;
  });
  for (const chai::Generation& generation : generations) {
    if (!streams)
      for (const std::int64_t token : generation.token_ids) std::cout << token << ' ';
    std::cout << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    generate({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
