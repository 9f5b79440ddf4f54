// A bundle's graph, loaded in ONNX Runtime, and what the sessions of both versions of the op do with it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runner/backends/onnxruntime/library.h"
#include "runner/manifest.h"

namespace chai {

ONNXTensorElementDataType onnx_type(ItemType type);

class OnnxRuntimeModel {
 public:
  // `op_library` is empty to run the function body. Throws std::runtime_error: the bundle is bfloat16, or its
  // graph does not fit its manifest or ONNX Runtime.
  OnnxRuntimeModel(const Ort::Env& environment, const std::string& bundle, const Manifest& manifest,
                   const Options& options, const std::string& op_library);

  Ort::Session& session() { return session_; }
  bool half_logits() const { return half_logits_; }

  // Tensors over the caller's memory. ONNX Runtime has none over constant memory; inputs are only read.
  template <typename T>
  Ort::Value value(const std::vector<T>& data, const std::vector<std::int64_t>& shape) const {
    return Ort::Value::CreateTensor<T>(memory_, const_cast<T*>(data.data()), data.size(), shape.data(),
                                       shape.size());
  }
  Ort::Value value(ItemType type, char* data, std::size_t bytes,
                   const std::vector<std::int64_t>& shape) const {
    return Ort::Value::CreateTensor(memory_, data, bytes, shape.data(), shape.size(), onnx_type(type));
  }

 private:
  Ort::MemoryInfo memory_{nullptr};
  Ort::Session session_{nullptr};
  bool half_logits_ = false;
};

// Logits of a step, float32 whatever the graph's are.
class Logits {
 public:
  // Makes them an output of the graph, [batch][1][vocab_size].
  void bind(Ort::IoBinding& binding, const OnnxRuntimeModel& model, std::int64_t batch,
            std::int64_t vocab_size);
  // What the last call wrote.
  const std::vector<float>& read();

 private:
  std::vector<float> values_;
  std::vector<Ort::Float16_t> raw_;
};

}  // namespace chai
