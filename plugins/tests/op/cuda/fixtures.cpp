#include "tests/op/cuda/fixtures.h"

#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "support/sha256.h"

namespace chai::cuda::test {

void RecordingLauncher::launch(std::size_t kernel, const LaunchSize& size, void** arguments, Stream) {
  if (refuses) throw std::runtime_error("the recorder refuses");
  Launch& launch = launches.emplace_back(Launch{kernel, size, {}});
  for (std::size_t i = 0; i < argument_counts_.at(kernel); ++i) {
    std::uint64_t value = 0;
    std::memcpy(&value, arguments[i], sizeof(value));
    launch.arguments.push_back(value);
  }
}

void RecordingLauncher::copy(void* target, const void* source, std::size_t bytes, Stream) {
  copies.push_back({target, source, bytes});
}

const char* const kIndex = R"({
  "format": "chai-kernels/2", "architecture": 90, "triton": "3.9.0",
  "spec": {"dtype": "float16", "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 16, "value_head_dim": 8,
           "probe_tokens": 5, "key_bits": 8, "value_bits": 4, "group_size": 8, "softcap": false, "sinks": true,
           "slopes": false},
  "pointer_alignment": 16, "workspace_alignment": 256,
  "workspace": [{"name": "plan", "type": "int32", "count": "B G *"},
                {"name": "weights", "type": "float16", "count": "B C *"}],
  "launches": [
    {"kernel": "several", "file": "several.cubin", "sha256": "SHA_SEVERAL", "when": "1 S <",
     "grid": ["S 4 cdiv", "H", "B"], "threads": 128, "shared_bytes": 70000,
     "arguments": [{"type": "pointer", "tensor": "query"}, {"type": "pointer", "tensor": "weights"},
                   {"type": "int32", "value": "C"}, {"type": "float32", "attribute": "scale"},
                   {"type": "pointer", "tensor": "key_cache"}, {"type": "pointer", "hidden": "global_scratch"}]},
    {"kernel": "one", "file": "one.cubin", "sha256": "SHA_ONE", "when": "S 1 ==",
     "grid": ["16 B R * cdiv", "R", "B"], "threads": 64, "shared_bytes": 0,
     "arguments": [{"type": "pointer", "tensor": "plan"}, {"type": "int32", "value": "online R G < *"},
                   {"type": "pointer", "tensor": "present_head_map"}, {"type": "pointer", "tensor": "output"}]}
  ]
})";

KernelDirectory::KernelDirectory(const std::string& index) {
  char name[] = "/tmp/chai-kernels-XXXXXX";
  REQUIRE(mkdtemp(name) != nullptr);
  path_ = name;
  write("several.cubin", "code of several");
  write("one.cubin", "code of one");
  std::string text = index;
  for (const auto& [placeholder, content] :
       {std::pair{"SHA_SEVERAL", "code of several"}, {"SHA_ONE", "code of one"}}) {
    const std::size_t place = text.find(placeholder);
    if (place != std::string::npos) text.replace(place, std::strlen(placeholder), sha256_hex(content));
  }
  write("index.json", text);
}

KernelDirectory::~KernelDirectory() {
  for (const char* name : {"several.cubin", "one.cubin", "index.json"}) std::remove(file(name).c_str());
  std::remove(path_.c_str());
}

void KernelDirectory::write(const std::string& name, const std::string& content) const {
  std::ofstream(file(name), std::ios::binary) << content;
}

const std::vector<std::pair<std::string, std::string>> kIndexDamages = {
    {"chai-kernels/2", "chai-kernels/1"},
    {"float16", "float8"},
    {"\"threads\": 128", "\"threads\": -1"},
    {"\"S 4 cdiv\"", "\"S 4\""},
    {"several.cubin", "../x"},
    {"\"tensor\": \"query\"", "\"tensor\": \"q\""},
    {"\"launches\": [", "\"launch\": ["},
    {"\"key_bits\": 8", "\"key_bits\": 80"},
    {"\"group_size\"", "\"group\""},
    {"90", "\"90\""}};

}  // namespace chai::cuda::test
