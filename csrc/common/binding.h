#pragma once
// What every binding shares. A binding (<family>_op.cpp) is compiled twice: into hessreg._C for
// CPU tensors and, with HESSREG_CUDA defined, into hessreg._cuda for CUDA tensors. It uses the
// LibTorch stable ABI only, so that one binary serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "element.h"

#ifdef HESSREG_CUDA
#define HESSREG_DISPATCH_KEY CUDA
#else
#define HESSREG_DISPATCH_KEY CPU
#endif

namespace hessreg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::kFloat32;
    case ScalarType::Double: return Element::kFloat64;
    case ScalarType::Half: return Element::kFloat16;
    case ScalarType::BFloat16: return Element::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float16, bfloat16, float32 or float64, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
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

// Uninitialised and contiguous, like another tensor; without the dispatcher.
inline Tensor new_like(const Tensor& like, std::initializer_list<int64_t> sizes) {
  constexpr int kMaxDims = 4;
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "new_like: too many dimensions");
  int64_t strides[kMaxDims], stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes.begin()[d], 1))
    strides[d] = stride;
  int32_t dtype, device;
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.begin(), strides, dtype, device,
                                                         like.get_device_index(), &result));
  return Tensor(result);
}

inline Tensor new_float64(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
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
