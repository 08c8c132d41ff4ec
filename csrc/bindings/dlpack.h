// The part of DLPack's C exchange interface (version 1) that is used here: how a tensor library tells
// where a tensor's memory lies, without Python code in between. Layouts are those of the DLPack standard.
#pragma once

#include <cstdint>

namespace fastrnn::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBFloat = 4;

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  const int64_t* shape;
  const int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* previous;
  void* allocate;
  void* from_python;
  void* to_python;
  int (*look)(void* object, Tensor* out);  // fills `out`, valid while the object lives; 0, or -1 with a Python error
  void* stream;
};

constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace fastrnn::dlpack
