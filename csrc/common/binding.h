#pragma once
// What every binding shares. A binding (<family>_op.cpp) is compiled twice: into hessreg._C for
// CPU tensors and, with HESSREG_CUDA defined, into hessreg._cuda for CUDA tensors. It uses the
// LibTorch stable ABI only, so that one binary serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <vector>

#include "element.h"

#ifdef HESSREG_CUDA
#define HESSREG_DISPATCH_KEY CUDA
#else
#define HESSREG_DISPATCH_KEY CPU
#endif

namespace hessreg {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's own number of a type: a ScalarType made of it asks torch for the numbers of all types.
inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}
inline int32_t device_type_of(const Tensor& tensor) {
  int32_t device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  return device;
}

// Whether two tensors are alike in dtype and device.
inline bool are_alike(const Tensor& a, const Tensor& b) {
  return dtype_of(a) == dtype_of(b) && device_type_of(a) == device_type_of(b) &&
         a.get_device_index() == b.get_device_index();
}

inline Element element_of(const Tensor& tensor, const char* name) {
  const int32_t dtype = dtype_of(tensor);
  if (dtype == aoti_torch_dtype_float32()) return Element::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return Element::kFloat64;
  if (dtype == aoti_torch_dtype_float16()) return Element::kFloat16;
  if (dtype == aoti_torch_dtype_bfloat16()) return Element::kBFloat16;
  STD_TORCH_CHECK(false, name, ": expected float16, bfloat16, float32 or float64, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// torch's own looks the operator up by its name.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  result.reserve(tensors.size());
  for (const Tensor& tensor : tensors) result.push_back(as_contiguous(tensor));
  return result;
}

// Uninitialised and contiguous, on the device of another tensor. (torch's own looks the operator up
// by its name, too.)
inline Tensor new_tensor(const Tensor& like, int32_t dtype, IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  for (size_t d = sizes.size(), stride = 1; d-- > 0; stride *= std::max<int64_t>(sizes[d], 1))
    strides[d] = static_cast<int64_t>(stride);
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, device_type_of(like), like.get_device_index(), &result));
  return Tensor(result);
}
inline Tensor new_like(const Tensor& like, IntHeaderOnlyArrayRef sizes) {
  return new_tensor(like, dtype_of(like), sizes);
}
inline Tensor new_float64(const Tensor& like, IntHeaderOnlyArrayRef sizes) {
  return new_tensor(like, aoti_torch_dtype_float64(), sizes);
}

#ifdef HESSREG_CUDA
// The device of a tensor made current, and the stream that torch uses there.
class Executor {
 public:
  explicit Executor(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

}  // namespace hessreg
