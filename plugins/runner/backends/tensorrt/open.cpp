#include "runner/backends/tensorrt/open.h"

#include <algorithm>

#include "runner/backends/tensorrt/session.h"
#include "runner/caches.h"
#include "support/error.h"

namespace chai {
namespace {

constexpr const char* kPlan = ".plan";

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Whether an engine is one of this model. It does not tell its probe tokens.
bool fits(const Geometry& engine, const Geometry& model) {
  return engine.num_layers == model.num_layers && engine.num_query_heads == model.num_query_heads &&
         engine.num_kv_heads == model.num_kv_heads && engine.vocab_size == model.vocab_size &&
         engine.kept_heads == model.kept_heads;
}

}  // namespace

std::unique_ptr<Session> open_tensorrt_session(const std::string& bundle, const Manifest& manifest,
                                               const Options& options, const std::string& plugin) {
  require(manifest.geometry.num_caches() == manifest.geometry.kept_heads.size(),
          bundle +
              " has layers that read another layer's KV cache, which TensorRT engines do not have; use "
              "ONNX Runtime");
  const std::string again = "; run `chai-export build " + bundle + " --backend tensorrt`";
  const auto record = manifest.engines.find("tensorrt");
  require(record != manifest.engines.end(), bundle + " has no tensorrt engine" + again + " first");
  require(record->second.is_of_this_model,
          "the tensorrt engine was built from another model.onnx" + again + " again");
  require(record->second.has_plugin,
          "the tensorrt engine is one of the function body, which this library does not run" + again);
  const Files& files = record->second.files;
  const auto plan =
      std::find_if(files.begin(), files.end(), [](const auto& file) { return ends_with(file.first, kPlan); });
  require(plan != files.end(), "the tensorrt engine of " + bundle + " has no .plan file" + again + " again");
  check_files(bundle, files, again + " again");
  auto session = std::make_unique<TensorRtSession>(bundle + "/" + plan->first, plugin, options.heads,
                                                   options.cache_memory);
  const std::int64_t page_bytes =
      bytes_per_token(cache_tensors(manifest, options.heads)) * session->page_length();
  require(fits(session->geometry(), manifest.geometry) && session->page_bytes() == page_bytes,
          "the tensorrt engine does not fit the bundle's manifest" + again + " again");
  return session;
}

}  // namespace chai
