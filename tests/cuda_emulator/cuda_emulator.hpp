// The host side of csrc/common/cuda_compat.cuh: CUDA's names for kernels, on the emulator's
// runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_intrinsics.hpp"
#include "cuda_types.hpp"
#include "runtime.hpp"

// The static tag tells arrays apart: each expansion, in each instance of a template, has its own.
#define HESSREG_SHARED(T, name, ...)                                                               \
  using name##_hessreg_type = T __VA_ARGS__;                                                       \
  static const char name##_hessreg_tag = 0;                                                        \
  name##_hessreg_type& name =                                                                      \
      *static_cast<name##_hessreg_type*>(::hessreg::emulator::static_shared(                       \
          {&name##_hessreg_tag, sizeof(name##_hessreg_type), alignof(name##_hessreg_type), #name}, \
          ::hessreg::emulator::Location::current()))
#define HESSREG_DYNAMIC_SHARED(T, name) \
  T* name = static_cast<T*>(            \
      ::hessreg::emulator::dynamic_shared(::hessreg::emulator::Location::current()))
#define HESSREG_UNROLL

#define threadIdx (::hessreg::emulator::thread_index())
#define blockIdx (::hessreg::emulator::block_index())
#define blockDim (::hessreg::emulator::block_dim())
#define gridDim (::hessreg::emulator::grid_dim())
constexpr int warpSize = 32;

// Where an instruction stands in the kernel.
#define HESSREG_EMU_HERE \
  ::hessreg::emulator::Location here = ::hessreg::emulator::Location::current()

// ---- Launching

namespace hessreg {

using cuda_stream = void*;

struct LaunchShape {
  const char* kernel_name;
  dim3 grid, block;
  size_t shared_bytes;
  cuda_stream stream;
  bool cooperative;
};

template <typename... Params, typename... Args>
void launch(const LaunchShape& shape, void (*kernel)(Params...), Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::remove_cvref_t<Params>...> arguments;
  } call{kernel, {std::forward<Args>(args)...}};
  emulator::run({.kernel_name = shape.kernel_name,
                 .grid = {shape.grid.x, shape.grid.y, shape.grid.z},
                 .block = {shape.block.x, shape.block.y, shape.block.z},
                 .shared_bytes = shape.shared_bytes,
                 .cooperative = shape.cooperative,
                 .body =
                     [](void* pointer) {
                       auto* call = static_cast<Call*>(pointer);
                       std::apply(call->kernel, call->arguments);
                     },
                 .arguments = &call,
                 .argument_bytes = sizeof call});
}

inline int64_t max_shared_bytes() { return static_cast<int64_t>(emulator::config().shared_limit); }

}  // namespace hessreg

// ---- Barriers and fences

HESSREG_EMU_INSTRUCTION void __syncthreads(HESSREG_EMU_HERE) {
  hessreg::emulator::block_barrier(here);
}
HESSREG_EMU_INSTRUCTION int __syncthreads_count(int predicate, HESSREG_EMU_HERE) {
  return hessreg::emulator::block_count(predicate, here);
}
HESSREG_EMU_INSTRUCTION int __syncthreads_and(int predicate, HESSREG_EMU_HERE) {
  return hessreg::emulator::block_count(!predicate, here) == 0;
}
HESSREG_EMU_INSTRUCTION int __syncthreads_or(int predicate, HESSREG_EMU_HERE) {
  return hessreg::emulator::block_count(predicate, here) != 0;
}
HESSREG_EMU_INSTRUCTION void __syncwarp(unsigned mask = 0xffffffffu, HESSREG_EMU_HERE) {
  using hessreg::emulator::Collective;
  hessreg::emulator::warp_collective(Collective::kSync, mask, nullptr, here);
}
HESSREG_EMU_INSTRUCTION void __threadfence() { hessreg::emulator::thread_fence(); }
HESSREG_EMU_INSTRUCTION void __threadfence_block() {}  // the emulated memory is sequential

// ---- Shuffles, votes and reductions of a warp

namespace hessreg::emulator {

template <typename T>
HESSREG_EMU_INSTRUCTION T shuffle(Collective kind, unsigned mask, T value, int source, int width,
                                  Location location) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(uint64_t));
  ShuffleArgument argument{0, 0, source, width};
  std::memcpy(&argument.value, &value, sizeof value);
  warp_collective(kind, mask, &argument, location);
  std::memcpy(&value, &argument.received, sizeof value);
  return value;
}

HESSREG_EMU_INSTRUCTION BallotArgument ballot(unsigned mask, int predicate, Location location) {
  BallotArgument argument{predicate != 0, 0, 0};
  warp_collective(Collective::kBallot, mask, &argument, location);
  return argument;
}

template <typename T>
HESSREG_EMU_INSTRUCTION T reduce(Collective kind, unsigned mask, T value, Location location) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  ReduceArgument argument{value};
  warp_collective(kind, mask, &argument, location);
  return static_cast<T>(argument.value);
}

}  // namespace hessreg::emulator

template <typename T>
HESSREG_EMU_INSTRUCTION T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
                                      HESSREG_EMU_HERE) {
  using hessreg::emulator::Collective;
  return hessreg::emulator::shuffle(Collective::kShuffle, mask, value, lane, width, here);
}
template <typename T>
HESSREG_EMU_INSTRUCTION T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                         HESSREG_EMU_HERE) {
  using hessreg::emulator::Collective;
  return hessreg::emulator::shuffle(Collective::kShuffleUp, mask, value, static_cast<int>(delta),
                                    width, here);
}
template <typename T>
HESSREG_EMU_INSTRUCTION T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                           HESSREG_EMU_HERE) {
  using hessreg::emulator::Collective;
  return hessreg::emulator::shuffle(Collective::kShuffleDown, mask, value, static_cast<int>(delta),
                                    width, here);
}
template <typename T>
HESSREG_EMU_INSTRUCTION T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                                          HESSREG_EMU_HERE) {
  using hessreg::emulator::Collective;
  return hessreg::emulator::shuffle(Collective::kShuffleXor, mask, value, lane_mask, width, here);
}

HESSREG_EMU_INSTRUCTION unsigned __ballot_sync(unsigned mask, int predicate, HESSREG_EMU_HERE) {
  return hessreg::emulator::ballot(mask, predicate, here).votes;
}
HESSREG_EMU_INSTRUCTION int __any_sync(unsigned mask, int predicate, HESSREG_EMU_HERE) {
  return hessreg::emulator::ballot(mask, predicate, here).votes != 0;
}
HESSREG_EMU_INSTRUCTION int __all_sync(unsigned mask, int predicate, HESSREG_EMU_HERE) {
  const auto result = hessreg::emulator::ballot(mask, predicate, here);
  return result.votes == result.voters;
}

template <typename T>
HESSREG_EMU_INSTRUCTION T __reduce_add_sync(unsigned mask, T value, HESSREG_EMU_HERE) {
  return hessreg::emulator::reduce(hessreg::emulator::Collective::kReduceAdd, mask, value, here);
}
template <typename T>
HESSREG_EMU_INSTRUCTION T __reduce_min_sync(unsigned mask, T value, HESSREG_EMU_HERE) {
  return hessreg::emulator::reduce(hessreg::emulator::Collective::kReduceMin, mask, value, here);
}
template <typename T>
HESSREG_EMU_INSTRUCTION T __reduce_max_sync(unsigned mask, T value, HESSREG_EMU_HERE) {
  return hessreg::emulator::reduce(hessreg::emulator::Collective::kReduceMax, mask, value, here);
}
HESSREG_EMU_INSTRUCTION unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                                   HESSREG_EMU_HERE) {
  return hessreg::emulator::reduce(hessreg::emulator::Collective::kReduceAnd, mask, value, here);
}
HESSREG_EMU_INSTRUCTION unsigned __reduce_or_sync(unsigned mask, unsigned value, HESSREG_EMU_HERE) {
  return hessreg::emulator::reduce(hessreg::emulator::Collective::kReduceOr, mask, value, here);
}
HESSREG_EMU_INSTRUCTION unsigned __reduce_xor_sync(unsigned mask, unsigned value,
                                                   HESSREG_EMU_HERE) {
  return hessreg::emulator::reduce(hessreg::emulator::Collective::kReduceXor, mask, value, here);
}

// ---- Atomics and cached loads: plain accesses, as a whole launch runs on one thread of the host

namespace hessreg::emulator {

HESSREG_EMU_INSTRUCTION void note_if_checked(const void* address, size_t bytes, Access access,
                                             Location location) {
  if constexpr (kChecked) note_access(address, bytes, access, Site(location));
}

template <typename T, typename Update>
HESSREG_EMU_INSTRUCTION T atomic_update(T* address, Location location, Update update) {
  note_if_checked(address, sizeof(T), Access::kAtomic, location);
  const T old = *address;
  *address = static_cast<T>(update(old));
  return old;
}

}  // namespace hessreg::emulator

template <typename T>
HESSREG_EMU_INSTRUCTION T atomicAdd(T* address, std::type_identity_t<T> value, HESSREG_EMU_HERE) {
  return hessreg::emulator::atomic_update(address, here, [=](T old) { return old + value; });
}
template <typename T>
HESSREG_EMU_INSTRUCTION T atomicMax(T* address, std::type_identity_t<T> value, HESSREG_EMU_HERE) {
  return hessreg::emulator::atomic_update(address, here, [=](T old) { return max(old, value); });
}
template <typename T>
HESSREG_EMU_INSTRUCTION T atomicMin(T* address, std::type_identity_t<T> value, HESSREG_EMU_HERE) {
  return hessreg::emulator::atomic_update(address, here, [=](T old) { return min(old, value); });
}
template <typename T>
HESSREG_EMU_INSTRUCTION T atomicExch(T* address, std::type_identity_t<T> value, HESSREG_EMU_HERE) {
  return hessreg::emulator::atomic_update(address, here, [=](T) { return value; });
}
template <typename T>
HESSREG_EMU_INSTRUCTION T atomicCAS(T* address, std::type_identity_t<T> compare,
                                    std::type_identity_t<T> value, HESSREG_EMU_HERE) {
  return hessreg::emulator::atomic_update(address, here,
                                          [=](T old) { return old == compare ? value : old; });
}
HESSREG_EMU_INSTRUCTION unsigned atomicInc(unsigned* address, unsigned limit, HESSREG_EMU_HERE) {
  return hessreg::emulator::atomic_update(
      address, here, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

template <typename T>
HESSREG_EMU_INSTRUCTION T __ldg(const T* address, HESSREG_EMU_HERE) {
  hessreg::emulator::note_if_checked(address, sizeof(T), hessreg::emulator::Access::kRead, here);
  return *address;
}
template <typename T>
HESSREG_EMU_INSTRUCTION T __ldcs(const T* address, HESSREG_EMU_HERE) {
  return __ldg(address, here);
}
template <typename T>
HESSREG_EMU_INSTRUCTION void __stcs(T* address, std::type_identity_t<T> value, HESSREG_EMU_HERE) {
  hessreg::emulator::note_if_checked(address, sizeof(T), hessreg::emulator::Access::kWrite, here);
  *address = value;
}

// ---- What cuda_compat.cuh wraps in PTX

namespace hessreg {

HESSREG_EMU_INSTRUCTION void grid_sync(HESSREG_EMU_HERE) { emulator::grid_barrier(here); }

HESSREG_EMU_INSTRUCTION void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2], const float (&c)[4],
                                              HESSREG_EMU_HERE) {
  emulator::MmaArgument argument{a, b, c, d};
  emulator::warp_collective(emulator::Collective::kMmaTf32, 0xffffffffu, &argument, here);
}

HESSREG_EMU_INSTRUCTION void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2], const float (&c)[4],
                                               HESSREG_EMU_HERE) {
  emulator::MmaArgument argument{a, b, c, d};
  emulator::warp_collective(emulator::Collective::kMmaBf16, 0xffffffffu, &argument, here);
}

HESSREG_EMU_INSTRUCTION void cp_async16(void* shared, const void* global, HESSREG_EMU_HERE) {
  emulator::async_copy(shared, global, 16, here);
}

template <typename T>
HESSREG_EMU_INSTRUCTION void cp_async(T* shared, const T* global, HESSREG_EMU_HERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  emulator::async_copy(shared, global, sizeof(T), here);
}

HESSREG_EMU_INSTRUCTION void cp_async_commit() { emulator::async_commit(); }

template <int kPending>
HESSREG_EMU_INSTRUCTION void cp_async_wait(HESSREG_EMU_HERE) {
  emulator::async_wait(kPending, here);
}

}  // namespace hessreg
