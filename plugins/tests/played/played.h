// What the players of CUDA and TensorRT do and remember.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace chai::test {

// The engine of a model whose next token is the last one plus one: two layers of one KV head of two, four
// query heads, keys in 8 bits (head dim 8, 2 scales), values in float16 (head dim 4), float16 logits over 50
// tokens, up to 5 rows of 16 new tokens and of 8 pages of 4 positions. It keeps a row's tokens in its pages,
// in the pool past_key.0, and gives logits of 0 where they are not those that it was fed before. The new head
// map of a fresh row is its first token.
struct Played {
  // Faults to play.
  bool no_stream = false;
  bool no_engine = false;
  bool no_library = false;
  int contexts_before_fault = -1;
  bool no_memory = false;
  bool no_step = false;
  std::size_t free_memory = 1 << 20;
  // Whether something registered the plugin before.
  bool plugin_is_registered = false;

  // What is alive.
  int streams = 0;
  int allocations = 0;  // on the device or pinned
  int graphs = 0;
  int objects = 0;  // of TensorRT
  int libraries = 0;
  int pools = 0;
  std::size_t pool_bytes = 0;  // taken from pools now, and at most
  std::size_t most_pool_bytes = 0;

  std::vector<nvinfer1::IExecutionContext*> contexts;
  std::vector<std::string> loaded_libraries;
  std::vector<cudaStreamCaptureMode> captures;
  int steps = 0;                                             // run, replayed ones included
  std::vector<std::pair<std::int64_t, std::int64_t>> calls;  // rows and tokens of each
  int captured_steps = 0;
  int replays = 0;
  int copies = 0;  // from the host to the device

  // Cubins given to the driver: content and where it began.
  struct Code {
    std::uintptr_t address;
    std::string content;
  };
  std::vector<Code> code;
  int architecture = 90;
  std::vector<std::pair<std::string, int>> shared_bytes;  // asked for, by kernel
  struct Launch {
    std::string kernel;
    unsigned grid[3];
    unsigned threads;
  };
  std::vector<Launch> launches;
};

// The one that is played; a test begins with a fresh one.
Played& played();
void play_afresh();

}  // namespace chai::test
