// Vectors of the length of the machine's registers, and the activation functions on them. They use the vector extensions of
// GCC and Clang, so that little of this code depends on the machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

// Numbers in a vector. The compiler would keep longer ones in memory.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// Bits in a word of a mask; widths of models are multiples of it, and rows of gates are filled up to one.
constexpr int WORD = 16;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Vector load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }
inline void store(float *to, Vector value) { *reinterpret_cast<Unaligned *>(to) = value; }
// Keeps the compiler from loading it again for each use, and from keeping it in memory.
template <class V>
inline V held(V value) {
#ifdef __AVX__
  asm("" : "+v"(value));
#endif
  return value;
}
inline Vector all(float value) { return value - Vector{}; }
inline Integers all(int32_t value) { return value - Integers{}; }
inline Vector choose(Integers condition, Vector yes, Vector no) {
  return reinterpret_cast<Vector>((condition & reinterpret_cast<Integers>(yes)) |
                                  (~condition & reinterpret_cast<Integers>(no)));
}
inline Vector zero_where(Integers condition, Vector otherwise) {
  return reinterpret_cast<Vector>(~condition & reinterpret_cast<Integers>(otherwise));
}
inline Vector magnitude(Vector x) { return reinterpret_cast<Vector>(reinterpret_cast<Integers>(x) & 0x7fffffff); }
// y if one of them is NaN.
inline Vector larger(Vector x, Vector y) {
#if defined(__AVX512F__)
  return _mm512_max_ps(x, y);
#elif defined(__AVX__)
  return _mm256_max_ps(x, y);
#else
  return choose(x > y, x, y);
#endif
}
inline Vector smaller(Vector x, Vector y) {
#if defined(__AVX512F__)
  return _mm512_min_ps(x, y);
#elif defined(__AVX__)
  return _mm256_min_ps(x, y);
#else
  return choose(x < y, x, y);
#endif
}
// NaN stays NaN.
inline Vector clamped(Vector x, float least, float most) { return smaller(all(most), larger(all(least), x)); }

// Between them 2^n below has an exponent that fp32 has.
constexpr float LEAST_POWER = -87.3f, LARGEST_POWER = 88.37f;

// e^x to about one unit in the last place: 2^n e^r with |r| <= ln 2 / 2 and the polynomial of Cephes' expf. 0 where it would
// be smaller than normal numbers, and never infinite. NaN stays.
inline Vector exponential(Vector power) {
  const Vector x = clamped(power, LEAST_POWER, LARGEST_POWER);
  const Vector shift = all(12582912.0f + 127);  // 1.5 * 2^23: adding it rounds to an integer; 127 is the bias of exponents
  const Vector shifted = x * 1.44269504088896341f + shift;
  const Vector n = shifted - shift;
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return zero_where(power < all(LEAST_POWER), p * reinterpret_cast<Vector>(reinterpret_cast<Integers>(shifted) << 23));
}

inline Vector reciprocal(Vector x) {
#ifdef __AVX512F__
  // 14 bits, doubled by a step of Newton's method: a division takes several times as long.
  const Vector r = reinterpret_cast<Vector>(_mm512_rcp14_ps(x));
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// erf as a rational function, as in Eigen and XLA.
inline Vector error_function(Vector x) {
  x = clamped(x, -4.0f, 4.0f);
  const Vector s = x * x;
  Vector p = all(-2.72614225801306e-10f);
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  Vector q = all(-1.45660718464996e-05f);
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

// Beyond all numbers each function and slope is its limit: SiLU and GELU of -inf are 0, though torch multiplies 0 by it.
struct Sigmoid {
  // There e^-x exceeds all numbers.
  static Integers vanishes(Vector x) { return x < all(-LARGEST_POWER); }
  static Vector value(Vector x) { return zero_where(vanishes(x), reciprocal(exponential(-x) + 1.0f)); }
  static Vector slope(Vector x) {
    const Vector s = value(x);
    return s * (1.0f - s);
  }
};
struct SiLU {
  static Vector value(Vector x) { return zero_where(Sigmoid::vanishes(x), x * reciprocal(exponential(-x) + 1.0f)); }
  static Vector slope(Vector x) {
    const Vector s = reciprocal(exponential(-x) + 1.0f);
    return zero_where(Sigmoid::vanishes(x), s * (smaller(all(LARGEST_POWER), x) * (1.0f - s) + 1.0f));
  }
};
struct GELU {
  static Vector value(Vector x) {
    x = larger(all(-std::numeric_limits<float>::max()), x);
    return 0.5f * x * (error_function(x * 0.70710678118654752f) + 1.0f);
  }
  static Vector slope(Vector x) {
    x = clamped(x, -64.0f, 64.0f);  // e^(-x^2 / 2) is 0 there
    return 0.5f * (error_function(x * 0.70710678118654752f) + 1.0f) + x * 0.39894228040143268f * exponential(-0.5f * x * x);
  }
};
struct ReLU {
  static Vector value(Vector x) { return zero_where(x <= Vector{}, x); }
  static Vector slope(Vector x) { return zero_where(x <= Vector{}, all(1.0f)); }
};
struct ReLUSquared {
  static Vector value(Vector x) { return ReLU::value(x) * ReLU::value(x); }
  static Vector slope(Vector x) { return 2.0f * ReLU::value(x); }
};

// In the order of ACTIVATIONS in mone_model/activations.py.
template <class F>
auto dispatch(int activation, F f) {
  switch (activation) {
    case 0: return f(SiLU{});
    case 1: return f(GELU{});
    case 2: return f(ReLU{});
    case 3: return f(Sigmoid{});
    default: return f(ReLUSquared{});
  }
}

inline int rounded_up(int n) { return (n + WORD - 1) / WORD * WORD; }

using mone::BFloat16;
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline Vector load(const BFloat16 *from) {
  const Integers bits = __builtin_convertvector(*reinterpret_cast<const Halves *>(from), Integers) << 16;
  return reinterpret_cast<Vector>(bits);
}
inline void store(BFloat16 *to, Vector value) {
  const Integers bits = reinterpret_cast<Integers>(value);
  const Integers nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Integers is_nan = value != value;
  *reinterpret_cast<Halves *>(to) = __builtin_convertvector((nearest & ~is_nan) | (0x7fc0 & is_nan), Halves);
}

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }
inline Vector load_lanes(const float *from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline void store_lanes(float *to, Vector value, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, value); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector load_lanes(const float *from, __m256i lanes) { return _mm256_maskload_ps(from, lanes); }
inline void store_lanes(float *to, Vector value, __m256i lanes) { _mm256_maskstore_ps(to, lanes, value); }
#endif

// At the end of a row the vector is filled up with zeros.
template <class T>
inline Vector load_first(const T *from, int64_t count) {
  if (count >= LANES) return load(from);
#ifdef __AVX2__
  if constexpr (std::is_same_v<T, float>) return load_lanes(from, first_lanes(count));
#endif
  T filled[LANES] = {};
  std::memcpy(filled, from, count * sizeof(T));
  return load(filled);
}
template <class T>
inline void store_first(T *to, Vector value, int64_t count) {
  if (count >= LANES) return store(to, value);
#ifdef __AVX2__
  if constexpr (std::is_same_v<T, float>) return store_lanes(to, value, first_lanes(count));
#endif
  T filled[LANES];
  store(filled, value);
  std::memcpy(to, filled, count * sizeof(T));
}

// f(j, count) for each vector of a row; only the last may have fewer lanes. In all others, count is a constant.
template <class F>
inline void each_vector(int64_t size, F f) {
  int64_t j = 0;
  for (; j + LANES <= size; j += LANES) f(j, std::integral_constant<int64_t, LANES>());
  if (j < size) f(j, size - j);
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// Store the first `count` of four numbers, or all if there are more to come.
inline void store_some(float *to, Four four, int count, bool add) {
#ifdef __AVX512VL__
  const __mmask8 mask = __mmask8((1u << std::min(count, 4)) - 1);
  const __m128 before = _mm_maskz_loadu_ps(add ? mask : __mmask8(0), to);
  _mm_mask_storeu_ps(to, mask, _mm_add_ps(before, four));
#else
  if (count >= 4) {
    Four *place = reinterpret_cast<Four *>(to);
    *place = add ? *place + four : four;
  } else {
    for (int i = 0; i < count; i++) to[i] = add ? to[i] + four[i] : four[i];
  }
#endif
}

// The sum of each of four vectors.
inline Four add_up(Vector a, Vector b, Vector c, Vector d) {
#ifdef __AVX512F__
  const Integers low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  const Integers high = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  const Vector ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const Vector cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  const Integers first = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const Integers second = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  const Vector abcd = __builtin_shuffle(ab, cd, first) + __builtin_shuffle(ab, cd, second);
  const Four *quarters = reinterpret_cast<const Four *>(&abcd);
  return (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
#else
  typedef int32_t Places __attribute__((vector_size(16)));
  const auto four_of = [](const Vector &vector) {
    const Four *quarters = reinterpret_cast<const Four *>(&vector);
    return LANES == 8 ? quarters[0] + quarters[1] : quarters[0];
  };
  const Four p = four_of(a), q = four_of(b), r = four_of(c), s = four_of(d);
  const Places low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  const Four pq = __builtin_shuffle(p, q, low) + __builtin_shuffle(p, q, high);
  const Four rs = __builtin_shuffle(r, s, low) + __builtin_shuffle(r, s, high);
  return __builtin_shuffle(pq, rs, Places{0, 1, 4, 5}) + __builtin_shuffle(pq, rs, Places{2, 3, 6, 7});
#endif
}

inline float total(Vector value) { return add_up(value, Vector{}, Vector{}, Vector{})[0]; }

// Of a row of whole vectors, in which NaN does not count.
inline float largest_of(const float *row, int64_t size) {
  constexpr int PARTS = 4;  // which need not wait for each other
  Vector most[PARTS];
  std::fill(most, most + PARTS, all(-std::numeric_limits<float>::infinity()));
  for (int64_t j = 0; j < size; j += PARTS * LANES)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) most[p] = larger(load(row + std::min(j + p * LANES, size - LANES)), most[p]);
  Vector top = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  for (int half = LANES / 2; half > 0; half /= 2) {  // in the end all lanes have it
    Integers other;
    for (int lane = 0; lane < LANES; lane++) other[lane] = lane ^ half;
    top = larger(__builtin_shuffle(top, other), top);
  }
  return top[0];
}

template <class T>
struct Aligned {
  T *data;
  explicit Aligned(size_t count) : data(static_cast<T *>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {}
  ~Aligned() { std::free(data); }
  Aligned(const Aligned &) = delete;
};

}  // namespace
