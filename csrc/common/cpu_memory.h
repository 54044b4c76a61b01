#pragma once
// How CPU kernels divide their workspace. All functions are always inlined. No torch.
#include "element.h"

namespace hessreg {

HESSREG_HD int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
HESSREG_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Hands out parts of a workspace; without one it measures what is needed.
class Arena {
 public:
  HESSREG_HD explicit Arena(void* workspace) : base_(reinterpret_cast<uintptr_t>(workspace)) {}
  template <typename T>
  HESSREG_HD T* take(int64_t count) {
    const uintptr_t here = base_ + static_cast<uintptr_t>(used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(here);
  }
  HESSREG_HD int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

}  // namespace hessreg
