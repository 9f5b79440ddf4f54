// The kernel index (index.json beside the cubins) as a list of launches, and its evaluation for one call.
//
// Which kernels run, with what grid, arguments and workspace is data that chai_export/kernels writes. Nothing
// here knows a kernel.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "op/cuda/formula.h"
#include "op/cuda/launcher.h"
#include "support/json.h"

namespace chai::cuda {

constexpr const char* kIndexFile = "index.json";

// The tensors a kernel may ask for. Pools go by the names of the op's inputs: kernels work on the present
// ones.
enum class Tensor : std::size_t {
  kQuery,
  kKey,
  kValue,
  kPastHeadMap,
  kPastLengths,
  kLengths,
  kOutput,
  kPresentHeadMap,
  kKeyCache,
  kValueCache,
  kKeyScales,
  kValueScales,
  kPageTable,
  kSinks,
  kAlibiSlopes,
  kCount
};
using Tensors = std::array<void*, static_cast<std::size_t>(Tensor::kCount)>;

// What the kernels were compiled for.
struct KernelSpec {
  std::string dtype;  // float32, float16 or bfloat16
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t probe_tokens = 0;
  std::int64_t architecture = 0;  // 90: compute capability 9.0, exactly
  std::int64_t key_bits = 0;
  std::int64_t value_bits = 0;
  std::int64_t group = 0;
  bool softcap = false;
  bool sinks = false;
  bool slopes = false;
};

// The attributes that kernels take as floats.
struct Floats {
  float scale = 1.0f;
  float softcap = 0.0f;
};

struct Kernel {
  std::string file;
  std::string symbol;
  std::string sha256;
  std::uint32_t threads = 0;
  std::uint32_t shared_bytes = 0;
};

// A launch with everything decided that shapes decide.
struct PlannedLaunch {
  struct Argument {
    enum class Kind { kTensor, kWorkspace, kInteger, kScale, kSoftcap, kNull };
    Kind kind = Kind::kNull;
    std::size_t tensor = 0;  // index in Tensors
    std::int64_t value = 0;  // offset in the workspace, or the integer
    std::size_t item_bytes = 8;
  };
  std::size_t kernel = 0;
  LaunchSize size;
  std::vector<Argument> arguments;
};
using Plan = std::vector<PlannedLaunch>;

class Program {
 public:
  // Throws std::runtime_error when the index is damaged or of another format.
  static Program parse(std::string_view index);

  const KernelSpec& spec() const { return spec_; }
  const std::vector<Kernel>& kernels() const { return kernels_; }
  // Addresses of float tensors and of the workspace must be multiples of this.
  std::size_t pointer_alignment() const { return pointer_alignment_; }

  std::size_t workspace_bytes(const Symbols& symbols) const;
  Plan plan(const Symbols& symbols) const;

 private:
  struct Section {
    std::string name;
    std::int64_t item_bytes = 0;
    Formula count;
  };
  struct Argument {
    PlannedLaunch::Argument::Kind kind = PlannedLaunch::Argument::Kind::kNull;
    std::size_t index = 0;  // of the tensor or the section
    std::size_t item_bytes = 8;
    Formula formula;
  };
  struct Launch {
    std::size_t kernel = 0;
    Formula when;
    std::array<Formula, 3> grid;
    std::vector<Argument> arguments;
  };

  void parse_launch(const Json& json);
  Argument parse_argument(const Json& json) const;
  std::vector<std::int64_t> section_offsets(const Symbols& symbols) const;

  KernelSpec spec_;
  std::size_t pointer_alignment_ = 1;
  std::vector<Kernel> kernels_;
  std::vector<Section> sections_;
  std::vector<Launch> launches_;
};

// Puts a plan's launches on the stream.
void run(const Plan& plan, const Tensors& tensors, void* workspace, const Floats& floats, Launcher& launcher,
         Stream stream);

}  // namespace chai::cuda
