// The order in which threads take turns.
#include <utility>

#include "engine.hpp"

namespace hessreg::emulator {

void Scheduler::reset(Order order, uint64_t seed) {
  order_ = order;
  state_ = seed * 0x9e3779b97f4a7c15u + 0x1234567u;
  ready_.clear();
  head_ = 0;
  last_block_ = nullptr;
}

// xorshift64
uint64_t Scheduler::random() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return state_;
}

// A ready fiber of the warp that ran last, the first in [begin, end); `end` if there is none.
size_t Scheduler::find_last_warp(size_t begin, size_t end) const {
  for (size_t i = begin; i < end; ++i) {
    if (ready_[i]->warp == last_warp_ && ready_[i]->block == last_block_) return i;
  }
  return end;
}

size_t Scheduler::pick() {
  const size_t start = head_ + random() % (ready_.size() - head_);
  if (order_ != Order::kStickyWarp) return start;
  const size_t after = find_last_warp(start, ready_.size());
  return after < ready_.size() ? after : find_last_warp(head_, start);
}

Fiber* Scheduler::pop() {
  if (head_ == ready_.size()) return nullptr;
  if (randomised()) std::swap(ready_[head_], ready_[pick()]);
  Fiber* fiber = ready_[head_++];
  last_block_ = fiber->block;
  last_warp_ = fiber->warp;
  constexpr size_t kCompactFrom = 8192;
  if (head_ > kCompactFrom && head_ * 2 > ready_.size()) {
    ready_.erase(ready_.begin(), ready_.begin() + static_cast<std::ptrdiff_t>(head_));
    head_ = 0;
  }
  return fiber;
}

}  // namespace hessreg::emulator
