#include "op/cuda/kernel_image.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>

#include "op/cuda/program.h"
#include "support/sha256.h"

namespace chai::cuda {
namespace {

constexpr std::string_view kMagic = "CHAIKRN1";
constexpr std::size_t kHashLength = 64;

[[noreturn]] void damaged(const std::string& reason) {
  throw std::runtime_error("the kernels in this engine are damaged (" + reason +
                           "); build it again with `chai-export build --backend tensorrt`");
}

template <typename Integer>
void append_integer(std::string& bytes, Integer value) {
  for (std::size_t i = 0; i < sizeof(Integer); ++i) bytes += static_cast<char>(value >> (8 * i) & 0xff);
}

void append_file(std::string& bytes, const std::string& name, const std::string& content) {
  append_integer(bytes, static_cast<std::uint32_t>(name.size()));
  bytes += name;
  append_integer(bytes, static_cast<std::uint64_t>(content.size()));
  bytes += content;
}

std::string read_file(const std::string& directory, const std::string& name) {
  if (name.empty() || name.find('/') != std::string::npos) {
    throw std::runtime_error("the kernel index in " + directory + " names the file '" + name +
                             "', which is not a plain name; compile the kernels again");
  }
  std::ifstream stream(directory + "/" + name, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  if (!stream.is_open() || stream.bad() || content.empty()) {
    throw std::runtime_error("cannot read " + directory + "/" + name +
                             "; compile the kernels again with `chai-export build --backend tensorrt`");
  }
  return content;
}

// Reads fields from the front of a view.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  std::string_view take(std::uint64_t size) {
    if (size > rest_.size()) damaged("cut off");
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }

  template <typename Integer>
  Integer integer() {
    Integer value = 0;
    const std::string_view taken = take(sizeof(Integer));
    for (std::size_t i = 0; i < sizeof(Integer); ++i) {
      value |= static_cast<Integer>(static_cast<unsigned char>(taken[i])) << (8 * i);
    }
    return value;
  }

  bool at_end() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

}  // namespace

KernelImage::KernelImage(std::string bytes) : bytes_(std::move(bytes)) {
  if (bytes_.size() < kMagic.size() + kHashLength) damaged("cut off");
  const std::string_view content(bytes_.data(), bytes_.size() - kHashLength);
  if (content.substr(0, kMagic.size()) != kMagic) damaged("not a kernel image of this version");
  hash_ = sha256_hex(content);
  if (hash_ != std::string_view(bytes_).substr(content.size())) damaged("its SHA-256 differs");
  Reader reader(content.substr(kMagic.size()));
  const auto count = reader.integer<std::uint32_t>();
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::string_view name = reader.take(reader.integer<std::uint32_t>());
    files_.emplace_back(name, reader.take(reader.integer<std::uint64_t>()));
  }
  if (!reader.at_end()) damaged("trailing bytes");
}

std::shared_ptr<const KernelImage> KernelImage::from_directory(const std::string& directory) {
  const std::string index = read_file(directory, kIndexFile);
  const Program program = Program::parse(index);
  std::map<std::string, std::string> files;  // several kernels may share a file
  for (const Kernel& kernel : program.kernels()) {
    std::string content = read_file(directory, kernel.file);
    if (!kernel.sha256.empty() && sha256_hex(content) != kernel.sha256) {
      throw std::runtime_error(directory + "/" + kernel.file +
                               " is not the file the index was written for; " + "compile the kernels again");
    }
    files[kernel.file] = std::move(content);
  }
  std::string bytes(kMagic);
  append_integer(bytes, static_cast<std::uint32_t>(files.size() + 1));
  append_file(bytes, kIndexFile, index);
  for (const auto& [name, content] : files) append_file(bytes, name, content);
  return share(bytes + sha256_hex(bytes));
}

std::shared_ptr<const KernelImage> KernelImage::from_bytes(std::string_view bytes) {
  return share(std::string(bytes));
}

std::shared_ptr<const KernelImage> KernelImage::share(std::string bytes) {
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<const KernelImage>> known;
  std::shared_ptr<const KernelImage> image(new KernelImage(std::move(bytes)));
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = known.begin(); it != known.end();)
    it = it->second.expired() ? known.erase(it) : std::next(it);
  std::weak_ptr<const KernelImage>& entry = known[image->hash_];
  if (const auto existing = entry.lock()) return existing;
  entry = image;
  return image;
}

std::string_view KernelImage::file(std::string_view name) const {
  for (const auto& [own, content] : files_) {
    if (own == name) return content;
  }
  damaged("no file '" + std::string(name) + "'");
}

}  // namespace chai::cuda
