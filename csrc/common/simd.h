#pragma once
// SIMD in GCC/Clang vector extensions, as wide as the instruction set of the object it is compiled
// into. All functions are always inlined (see HESSREG_HD). No torch.
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "element.h"

namespace hessreg {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T, int L>
struct VectorOf {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
};
template <typename T, int L = kLanes<T>>
using Vector = typename VectorOf<T, L>::type;

// Half-precision numbers as they lie in memory.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What an element is computed in: itself, or float32 for the half-precision types.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

HESSREG_HD float to_compute(float x) { return x; }
HESSREG_HD double to_compute(double x) { return x; }
HESSREG_HD float to_compute(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
HESSREG_HD float to_compute(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  uint32_t bits;
  float value;
  if (rest >= 0x7c00u) {  // infinity, NaN
    bits = 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400u) {  // normal: exponent bias 15 becomes 127
    bits = (rest << 13) + (112u << 23);
  } else {  // subnormal: a multiple of 2^-24, exact in float32
    value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
HESSREG_HD T from_compute(Compute<T> x) {
  return x;
}
template <>
HESSREG_HD BFloat16 from_compute<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};  // NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
template <>
HESSREG_HD Float16 from_compute<Float16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};  // NaN
  if (magnitude >= 0x477ff000u)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past 65504
  if (magnitude < 0x38800000u) {  // below 2^-14: round to a multiple of 2^-24 by adding 0.5
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, sizeof rounded);
    return {static_cast<uint16_t>(sign | (rounded - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

template <typename T, int L = kLanes<Compute<T>>>
HESSREG_HD Vector<Compute<T>, L> load(const T* p) {
  Vector<Compute<T>, L> v;
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    std::memcpy(&v, p, sizeof v);
    return v;
  }
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Float16> && L == 8)
    return (Vector<float, L>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  if constexpr (std::is_same_v<T, Float16> && L == 4)
    return (Vector<float, L>)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
#endif
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, Float16> && L == 16)
    return (Vector<float, L>)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)p));
#endif
  for (int lane = 0; lane < L; ++lane) v[lane] = to_compute(p[lane]);
  return v;
}

template <typename T>
HESSREG_HD void store(T* p, Vector<Compute<T>> v) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    std::memcpy(p, &v, sizeof v);
    return;
  }
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, Float16>)
    return _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(-1, (__m512)v, 0));
#elif defined(__F16C__)
  if constexpr (std::is_same_v<T, Float16>)
    return _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0));
#endif
  for (int lane = 0; lane < kLanes<Compute<T>>; ++lane) p[lane] = from_compute<T>(v[lane]);
}

// The first `count` elements, all that there are of them, and zeros beyond.
template <typename C>
HESSREG_HD Vector<C> load_some(const C* p, int64_t count) {
  if (count >= kLanes<C>) return load<C, kLanes<C>>(p);
#if defined(__AVX512F__)
  const auto mask = static_cast<uint16_t>(count > 0 ? (1u << count) - 1 : 0);
  if constexpr (sizeof(C) == 4) return (Vector<C>)_mm512_maskz_loadu_ps(mask, p);
  if constexpr (sizeof(C) == 8) return (Vector<C>)_mm512_maskz_loadu_pd(mask, p);
#endif
  Vector<C> v = {};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
}

template <typename T>
HESSREG_HD void store_some(T* p, const Vector<Compute<T>>& v, int64_t count) {
  if (count >= kLanes<Compute<T>>) return store<T>(p, v);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = from_compute<T>(v[lane]);
}

// A hint only: any address will do.
HESSREG_HD void prefetch(const void* p) { __builtin_prefetch(p); }

// Past the caches, for output that would only push the input out of them. p must be aligned.
template <typename T>
HESSREG_HD void stream(T* p, Vector<Compute<T>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
    return;
  }
#endif
  store(p, v);
}

// Makes what was streamed visible to other threads.
HESSREG_HD void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// As many elements as a vector of float64 holds. (GCC 12 splits __builtin_convertvector, and takes
// the unmasked 512-bit intrinsic for a use of uninitialised data.)
template <typename T>
HESSREG_HD Vector<double> load_double(const T* p) {
  const auto v = load<T, kLanes<double>>(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == sizeof(float))
    return (Vector<double>)_mm512_maskz_cvtps_pd(0xff, (__m256)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(v[0]) == sizeof(float)) return (Vector<double>)_mm256_cvtps_pd((__m128)v);
#endif
  return __builtin_convertvector(v, Vector<double>);
}

// The same way back; past the caches if asked to, p being aligned then.
template <typename T, bool kStream>
HESSREG_HD void store_double(T* p, Vector<double> v) {
  if constexpr (std::is_same_v<T, double>) return kStream ? stream(p, v) : store(p, v);
#if defined(__AVX512F__)
  const __m256 narrow = _mm512_maskz_cvtpd_ps(0xff, (__m512d)v);
  if constexpr (std::is_same_v<T, float>)
    return kStream ? _mm256_stream_ps((float*)p, narrow) : _mm256_storeu_ps((float*)p, narrow);
  if constexpr (std::is_same_v<T, Float16>)
    return _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(narrow, 0));
#elif defined(__AVX2__)
  const __m128 narrow = _mm256_cvtpd_ps((__m256d)v);
  if constexpr (std::is_same_v<T, float>)
    return kStream ? _mm_stream_ps((float*)p, narrow) : _mm_storeu_ps((float*)p, narrow);
  if constexpr (std::is_same_v<T, Float16>)
    return _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph(narrow, 0));
#endif
  for (int lane = 0; lane < kLanes<double>; ++lane)
    p[lane] = from_compute<T>(static_cast<Compute<T>>(v[lane]));
}

// 2^(s scale) where that is at most 1, with a relative error of 2e-9 (float32: besides rounding)
// and 2e-17 (float64): 2^round(t) from the bits of t plus a large number, times a minimax
// polynomial of the rest, which is exactly 1 at 0. Zero where the result would be subnormal.
HESSREG_HD Vector<float> exp2_of_product(Vector<float> s, float scale) {
  using Bits = VectorOf<int32_t, kLanes<float>>::type;
  constexpr float kShift = 12582912.f + 127.f;  // 1.5 2^23, and the bias of the exponent
  const Vector<float> shifted = s * scale + kShift, f = s * scale - (shifted - kShift);
  Vector<float> p = f * 1.5353358537e-4f + 1.33988748e-3f;
  p = p * f + 9.618437374e-3f;
  p = p * f + 5.550332470e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.f;
  const Vector<float> power = (Vector<float>)((Bits)shifted << 23);
  return shifted < kShift - 126.f ? Vector<float>{} : p * power;
}
HESSREG_HD Vector<double> exp2_of_product(Vector<double> s, double scale) {
  using Bits = VectorOf<int64_t, kLanes<double>>::type;
  constexpr double kShift = 6755399441055744. + 1023.;  // 1.5 2^52, and the bias of the exponent
  constexpr double kCoefficients[] = {
      4.4549605981865186e-10, 7.0725859492692230e-9, 1.0178062445845774e-7, 1.3215442587921690e-6,
      1.5252733829836120e-5,  1.5403530441736050e-4, 1.3333558146416936e-3, 9.6181291076068880e-3,
      5.5504108664821600e-2,  2.4022650695910097e-1, 6.9314718055994530e-1, 1.};
  const Vector<double> shifted = s * scale + kShift, f = s * scale - (shifted - kShift);
  Vector<double> p = {};
  for (const double coefficient : kCoefficients) p = p * f + coefficient;
  const Vector<double> power = (Vector<double>)((Bits)shifted << 52);
  return shifted < kShift - 1022. ? Vector<double>{} : p * power;
}

// The signs of the lanes, for `any_negative` of several taken together with |.
template <typename T>
using Signs =
    typename VectorOf<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, kLanes<T>>::type;
template <typename T>
HESSREG_HD bool any_negative(Signs<T> signs) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask((__m512i)signs) != 0;
  return _mm512_movepi32_mask((__m512i)signs) != 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd((__m256d)signs) != 0;
  return _mm256_movemask_ps((__m256)signs) != 0;
#else
  bool result = false;
  for (int lane = 0; lane < kLanes<T>; ++lane) result |= signs[lane] < 0;
  return result;
#endif
}

// Rows become columns: blocks of half the size change places, then blocks of a quarter in these.
template <typename T>
HESSREG_HD void transpose(Vector<T> (&rows)[kLanes<T>]) {
#pragma GCC unroll 4
  for (int step = kLanes<T> / 2; step > 0; step /= 2) {
    Signs<T> low, high;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      low[lane] = lane & step ? kLanes<T> + lane - step : lane;
      high[lane] = lane & step ? kLanes<T> + lane : lane + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & step) continue;
      const Vector<T> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

template <typename T>
HESSREG_HD T sum_lanes(Vector<T> v) {
  T total = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) total += v[lane];
  return total;
}

HESSREG_HD double sum(Vector<double> v) {
  double total = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) total += v[lane];
  return total;
}

}  // namespace hessreg
