// Compiled kernels as one block of bytes: what an engine carries, and what a directory of cubins becomes.
//
// Layout, little endian: "CHAIKRN1", file count (u32), per file name length (u32), name, size (u64), content;
// then the SHA-256 of all that, 64 hexadecimal digits. The first file is index.json.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace chai::cuda {

class KernelImage {
 public:
  // Both throw std::runtime_error when something is missing or damaged. Equal images are kept in memory once
  // per process, however many layers ask for them.
  static std::shared_ptr<const KernelImage> from_directory(const std::string& directory);
  static std::shared_ptr<const KernelImage> from_bytes(std::string_view bytes);

  const std::string& bytes() const { return bytes_; }
  const std::string& hash() const { return hash_; }
  // Content of a file of the image. Throws when there is none of this name.
  std::string_view file(std::string_view name) const;

  KernelImage(const KernelImage&) = delete;
  KernelImage& operator=(const KernelImage&) = delete;

 private:
  explicit KernelImage(std::string bytes);
  static std::shared_ptr<const KernelImage> share(std::string bytes);

  std::string bytes_;
  std::string hash_;
  std::vector<std::pair<std::string_view, std::string_view>> files_;  // views into bytes_
};

}  // namespace chai::cuda
