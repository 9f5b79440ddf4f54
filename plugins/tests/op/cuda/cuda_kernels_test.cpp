// Loading and launching cubins on a player of CUDA's runtime.
#include "op/cuda/cuda_kernels.h"

#include <doctest/doctest.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/op/cuda/fixtures.h"
#include "tests/played/played.h"

namespace chai::cuda::test {
namespace {

using chai::test::play_afresh;
using chai::test::played;

TEST_CASE("cubins are handed to the driver whole and aligned, wherever they lie in the image") {
  play_afresh();
  const KernelDirectory directory;
  const auto image = KernelImage::from_directory(directory.path());
  {
    const CudaKernels kernels(*image);
    REQUIRE(played().code.size() == 2);
    CHECK(played().code[0].content == "code of several");
    CHECK(played().code[1].content == "code of one");
    for (const auto& code : played().code) CHECK(code.address % 64 == 0);
    CHECK(played().libraries == 2);
  }
  CHECK(played().libraries == 0);
}

TEST_CASE("a kernel that is not in its cubin is named, and nothing stays loaded") {
  play_afresh();
  const std::string index = std::string(kIndex);
  std::string changed = index;
  changed.replace(changed.find("\"kernel\": \"one\""), 15, "\"kernel\": \"two\"");
  const KernelDirectory directory(changed);
  const auto image = KernelImage::from_directory(directory.path());
  CHECK_THROWS_WITH_AS(CudaKernels{*image}, doctest::Contains("finding two failed"), std::runtime_error);
  CHECK(played().libraries == 0);
}

TEST_CASE("kernels are prepared for the GPU they were compiled for") {
  play_afresh();
  const KernelDirectory directory;
  CudaKernels kernels(*KernelImage::from_directory(directory.path()));
  kernels.prepare_device();
  // More than 48 KiB must be asked for.
  CHECK(played().shared_bytes == std::vector<std::pair<std::string, int>>{{"several", 70000}});
  played().architecture = 80;
  CHECK_THROWS_WITH_AS(kernels.prepare_device(),
                       doctest::Contains("the kernels are for sm_90 and this GPU is sm_80"),
                       std::runtime_error);
  LaunchSize size;
  size.grid = {2, 3, 4};
  size.threads = 64;
  kernels.launch(1, size, nullptr, nullptr);
  REQUIRE(played().launches.size() == 1);
  CHECK(played().launches[0].kernel == "one");
  CHECK(played().launches[0].grid[2] == 4);
  CHECK(played().launches[0].threads == 64);
}

}  // namespace
}  // namespace chai::cuda::test
