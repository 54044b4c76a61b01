// CUDA's vector and half types for host code: from the toolkit's headers where they are installed,
// else the few that kernels of this project use. Also makes CUDA's keywords mean nothing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if __has_include(<cuda_fp16.h>) && !defined(HESSREG_EMU_NO_TOOLKIT)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#else

// clang-format off
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct int3 { int x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
// clang-format on

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

namespace hessreg::emulator {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Drops the `count` lowest bits, rounding to nearest, ties to even.
inline uint32_t round_off_bits(uint32_t bits, int count) {
  const uint32_t half_less_one = (1u << (count - 1)) - 1;
  return (bits + half_less_one + ((bits >> count) & 1)) >> count;
}

}  // namespace hessreg::emulator

inline float __half2float(__half h) {
  using namespace hessreg::emulator;
  const uint32_t sign = (h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1f, mantissa = h.bits & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24
    return float_from_bits(sign | float_bits(std::ldexp(static_cast<float>(mantissa), -24)));
  }
  const uint32_t float_exponent = exponent == 31 ? 255 : exponent + (127 - 15);
  return float_from_bits(sign | float_exponent << 23 | mantissa << 13);
}

inline __half __float2half_rn(float value) {
  using namespace hessreg::emulator;
  const uint32_t sign = float_bits(value) >> 16 & 0x8000u;
  const uint32_t magnitude = float_bits(value) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) return {0x7fff};  // NaN
  if (magnitude >= 0x477ff000u) {                // 65520 and above
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // subnormal: 0.5 + x has half's last place, 2^-24
    half = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    half = round_off_bits(magnitude, 13) - ((127 - 15) << 10);
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline float __bfloat162float(__nv_bfloat16 b) {
  return hessreg::emulator::float_from_bits(static_cast<uint32_t>(b.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  using namespace hessreg::emulator;
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>(round_off_bits(float_bits(value), 16))};
}

inline __half __float2half(float value) { return __float2half_rn(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }

#endif

// The toolkit's headers define these for its own host compilers.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __launch_bounds__(...)
#define __forceinline__ inline
// One copy of the parameter per launch, which the threads share, as on the GPU.
#define __grid_constant__ &
#define __shared__ use_HESSREG_SHARED_instead_of_raw___shared__ !
