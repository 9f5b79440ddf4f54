#include "runner/backends/onnxruntime/model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "runner/backends/onnxruntime/graph_check.h"
#include "runner/graph_names.h"
#include "support/error.h"
#include "support/half.h"

namespace chai {
namespace {

Ort::Session open_session(const Ort::Env& environment, const std::string& model, const Options& options,
                          const std::string& op_library) {
  Ort::SessionOptions session_options;
  session_options.SetIntraOpNumThreads(options.threads);
  if (!op_library.empty()) {
    try {
      session_options.RegisterCustomOpsLibrary(op_library.c_str());
    } catch (const Ort::Exception& error) {
      throw std::runtime_error(op_library + " does not load in ONNX Runtime (" + error.what() +
                               "); build it again, or run without it");
    }
  }
  try {
    return Ort::Session(environment, model.c_str(), session_options);
  } catch (const Ort::Exception& error) {
    throw std::runtime_error("ONNX Runtime cannot load " + model + " (" + error.what() + "); export again");
  }
}

bool has_half_logits(const Ort::Session& session) {
  const Ort::AllocatorWithDefaultOptions allocator;
  for (std::size_t i = 0; i < session.GetOutputCount(); ++i) {
    if (std::strcmp(session.GetOutputNameAllocated(i, allocator).get(), graph::kLogits) != 0) continue;
    const Ort::TypeInfo info = session.GetOutputTypeInfo(i);
    return info.GetTensorTypeAndShapeInfo().GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  }
  return false;
}

}  // namespace

ONNXTensorElementDataType onnx_type(ItemType type) {
  switch (type) {
    case ItemType::kFloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case ItemType::kBfloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case ItemType::kInt8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    case ItemType::kUint8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

OnnxRuntimeModel::OnnxRuntimeModel(const Ort::Env& environment, const std::string& bundle,
                                   const Manifest& manifest, const Options& options,
                                   const std::string& op_library) {
  require(manifest.item_type != ItemType::kBfloat16,
          bundle +
              " is bfloat16, which ONNX Runtime does not compute on a CPU; export with --dtype float32 or "
              "float16");
  const std::string model = bundle + "/model.onnx";
  session_ = open_session(environment, model, options, op_library);
  memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  try {
    check_graph(session_, manifest);
  } catch (const std::exception& error) {
    throw std::runtime_error(model + " does not fit its manifest: " + error.what() +
                             "; export or rewrite again");
  }
  half_logits_ = has_half_logits(session_);
}

void Logits::bind(Ort::IoBinding& binding, const OnnxRuntimeModel& model, std::int64_t batch,
                  std::int64_t vocab_size) {
  values_.resize(static_cast<std::size_t>(batch * vocab_size));
  raw_.resize(model.half_logits() ? values_.size() : 0);
  const std::vector<std::int64_t> shape{batch, 1, vocab_size};
  binding.BindOutput(graph::kLogits,
                     model.half_logits() ? model.value(raw_, shape) : model.value(values_, shape));
}

const std::vector<float>& Logits::read() {
  std::transform(raw_.begin(), raw_.end(), values_.begin(),
                 [](Ort::Float16_t half) { return half_to_float(half.val); });
  return values_;
}

}  // namespace chai
