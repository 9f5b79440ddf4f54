// The part of TensorRT's runtime that the C++ session calls, played by played.cpp: for tests on machines
// without TensorRT. What is named here is as in TensorRT's header, with which the same source is compiled
// elsewhere.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace nvinfer1 {

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBF16 = 7, kINT64 = 8 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class ExecutionContextAllocationStrategy : std::int32_t {
  kSTATIC = 0,
  kON_PROFILE_CHANGE = 1,
  kUSER_MANAGED = 2
};

struct Dims {
  std::int32_t nbDims;
  std::int64_t d[8];
};

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~ILogger() = default;
};

class IExecutionContext {
 public:
  explicit IExecutionContext(ExecutionContextAllocationStrategy strategy);
  ~IExecutionContext();
  bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept;
  bool setInputShape(const char* name, const Dims& shape) noexcept;
  bool setTensorAddress(const char* name, void* address) noexcept;
  void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept;
  bool enqueueV3(cudaStream_t stream) noexcept;

  ExecutionContextAllocationStrategy strategy;
  std::int32_t profile = -1;
  void* memory = nullptr;
  std::int64_t memory_size = 0;
  std::map<std::string, Dims> shapes;
  std::map<std::string, void*> addresses;
  int bound = 0;  // how often a shape or an address was set
};

class ICudaEngine {
 public:
  ICudaEngine();
  ~ICudaEngine();
  Dims getProfileShape(const char* name, std::int32_t profile, OptProfileSelector selector) const noexcept;
  std::int32_t getNbIOTensors() const noexcept;
  const char* getIOTensorName(std::int32_t index) const noexcept;
  Dims getTensorShape(const char* name) const noexcept;
  DataType getTensorDataType(const char* name) const noexcept;
  std::int64_t getDeviceMemorySizeForProfileV2(std::int32_t profile) const noexcept;
  IExecutionContext* createExecutionContext(
      ExecutionContextAllocationStrategy strategy = ExecutionContextAllocationStrategy::kSTATIC) noexcept;
};

class IPluginCreatorInterface {};

class IPluginRegistry {
 public:
  using PluginLibraryHandle = void*;
  IPluginCreatorInterface* getCreator(const char* name, const char* version, const char* space = "") noexcept;
  PluginLibraryHandle loadLibrary(const char* path) noexcept;
};

class IRuntime {
 public:
  IRuntime();
  ~IRuntime();
  IPluginRegistry& getPluginRegistry() noexcept;
  ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t size) noexcept;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1
