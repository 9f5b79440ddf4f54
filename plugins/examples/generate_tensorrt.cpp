// Greedy text from a TensorRT engine, token ids in and out:
//
//   generate_tensorrt BUNDLE/engines/tensorrt/engine.plan libchai_tensorrt.so 16 64 17 4 256 9
//
// prints up to 64 new token ids for the prompt 17 4 256 9, of a bundle whose manifest.json says
// "probe_tokens": 16. `chai-export run BUNDLE --backend tensorrt --token-ids 17,4,256,9 --json` prints the
// same ids.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "runner/backends/tensorrt/session.h"

namespace {

std::int64_t number(const char* text) {
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < 0)
    throw std::runtime_error(std::string(text) + " is not a number of at least 0");
  return value;
}

std::int64_t most_likely(const std::vector<float>& logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

// Feeds what is new in a text, in chunks, and returns the logits after its last token. A text that was
// shorter than the probe is fed again as a whole, so that the head map is decided from all of the probe.
std::vector<float> feed(chai::TensorRtSession& session, const std::vector<std::int64_t>& text,
                        std::int64_t past, std::int64_t probe_tokens) {
  const auto end = static_cast<std::int64_t>(text.size());
  std::int64_t start = past < probe_tokens ? 0 : past;
  std::vector<float> logits;
  while (start < end) {
    const std::int64_t count = std::min(end - start, session.max_tokens());
    const std::vector<std::int64_t> chunk(text.begin() + start, text.begin() + start + count);
    logits = session.step(
        {chunk, {static_cast<std::int32_t>(count)}, {static_cast<std::int32_t>(start)}, {count - 1}}, {0});
    start += count;
  }
  return logits;
}

void generate(const std::string& plan, const std::string& plugin, std::int64_t probe_tokens,
              std::int64_t new_tokens, const std::vector<std::int64_t>& prompt) {
  chai::TensorRtSession session(plan, plugin);
  const auto prompt_tokens = static_cast<std::int64_t>(prompt.size());
  const std::int64_t most = std::min(prompt_tokens + new_tokens, session.max_capacity());
  session.start(1, (most + session.page_length() - 1) / session.page_length());
  session.promise(0, most);

  std::vector<std::int64_t> text = prompt;
  std::int64_t past = 0;  // tokens of the text that are in the caches
  for (std::int64_t i = 0; i < new_tokens; ++i) {
    const std::int64_t token = most_likely(feed(session, text, past, probe_tokens));
    past = static_cast<std::int64_t>(text.size());
    std::cout << token << (i + 1 < new_tokens ? ' ' : '\n') << std::flush;
    if (past >= most) break;
    text.push_back(token);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc < 6)
      throw std::runtime_error("usage: generate_tensorrt ENGINE PLUGIN PROBE_TOKENS NEW_TOKENS TOKEN_ID...");
    std::vector<std::int64_t> prompt;
    for (int i = 5; i < argc; ++i) prompt.push_back(number(argv[i]));
    generate(argv[1], argv[2], number(argv[3]), number(argv[4]), prompt);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
