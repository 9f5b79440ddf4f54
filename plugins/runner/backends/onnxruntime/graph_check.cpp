#include "runner/backends/onnxruntime/graph_check.h"

#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "runner/backends/onnxruntime/model.h"
#include "runner/caches.h"
#include "runner/graph_names.h"
#include "support/error.h"

namespace chai {
namespace {

constexpr std::int64_t kAny = -1;

struct Tensor {
  ONNXTensorElementDataType type;
  std::vector<std::int64_t> shape;
};
using Signature = std::map<std::string, Tensor>;

Tensor describe(const Ort::TypeInfo& info) {
  if (info.GetONNXType() != ONNX_TYPE_TENSOR) return {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
  const auto tensor = info.GetTensorTypeAndShapeInfo();
  return {tensor.GetElementType(), tensor.GetShape()};
}

void expect(const Signature& given, const std::string& name, const Tensor& wanted) {
  const auto found = given.find(name);
  require(found != given.end(), "it has no " + name);
  const Tensor& tensor = found->second;
  require(tensor.type == wanted.type, name + " has another type");
  require(tensor.shape.size() == wanted.shape.size(), name + " has another rank");
  for (std::size_t i = 0; i < wanted.shape.size(); ++i) {
    const bool same = tensor.shape[i] == wanted.shape[i] || tensor.shape[i] < 0 || wanted.shape[i] == kAny;
    require(same, name + " has size " + std::to_string(tensor.shape[i]) + " in dimension " +
                      std::to_string(i) + ", not " + std::to_string(wanted.shape[i]));
  }
}

}  // namespace

void check_graph(const Ort::Session& session, const Manifest& manifest) {
  const Geometry& geometry = manifest.geometry;
  const Ort::AllocatorWithDefaultOptions allocator;
  Signature inputs;
  Signature outputs;
  for (std::size_t i = 0; i < session.GetInputCount(); ++i)
    inputs[session.GetInputNameAllocated(i, allocator).get()] = describe(session.GetInputTypeInfo(i));
  for (std::size_t i = 0; i < session.GetOutputCount(); ++i)
    outputs[session.GetOutputNameAllocated(i, allocator).get()] = describe(session.GetOutputTypeInfo(i));

  const auto int64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  const auto int32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  const Tensor map{int32, {geometry.num_layers, kAny, geometry.num_query_heads}};
  expect(inputs, graph::kInputIds, {int64, {kAny, kAny}});
  expect(inputs, graph::kLengths, {int32, {kAny}});
  expect(inputs, graph::kPastLengths, {int32, {kAny}});
  expect(inputs, graph::kOutputPositions, {int64, {kAny, kAny}});
  expect(inputs, graph::kHeadMap, map);
  expect(outputs, graph::kPresentHeadMap, map);
  // A model's head may compute in float32 whatever the type of its caches.
  const auto logits = outputs.find(graph::kLogits);
  const bool wide = logits != outputs.end() && logits->second.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  const auto item = onnx_type(manifest.item_type);
  expect(outputs, graph::kLogits,
         {wide ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : item, {kAny, kAny, geometry.vocab_size}});
  const std::set<std::int64_t> windows = geometry.cache_windows();
  for (const std::int64_t window : windows) expect(inputs, graph::page_table(window), {int32, {kAny, kAny}});
  const std::vector<CacheTensor> caches = cache_tensors(manifest, Heads::kChai);
  for (const CacheTensor& cache : caches) {
    // The K cache's second size is free: it decides between kept heads and all heads.
    const std::int64_t heads = cache.name.rfind("key", 0) == 0 ? kAny : cache.heads;
    const Tensor tensor{onnx_type(cache.type), {kAny, heads, kAny, cache.columns}};
    expect(inputs, graph::kPast + cache.name, tensor);
    expect(outputs, graph::kPresent + cache.name, tensor);
  }
  require(inputs.size() == 5 + windows.size() + caches.size(), "it has further inputs");
}

}  // namespace chai
