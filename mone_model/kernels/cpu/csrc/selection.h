// The neurons that each row keeps, and what is computed of them.
#pragma once

#include <cmath>
#include <limits>

#include "vectors.h"

namespace {

// A mask has one bit for each neuron of a row, in words: 1 if it is kept.

inline int words_of(int neurons) { return (neurons + WORD - 1) / WORD; }

// The bits of the vector that begins at neuron j.
inline unsigned bits_at(const uint16_t *mask, size_t j) {
  if (LANES == 8) return reinterpret_cast<const uint8_t *>(mask)[j / 8];  // little-endian
  return mask[j / WORD] >> j % WORD & ((1u << LANES) - 1);
}

inline unsigned bits_of(Integers condition) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(condition));
#elif defined(__AVX__) && !defined(__AVX512F__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(condition));
#else
  unsigned bits = 0;
  for (int i = 0; i < LANES; i++) bits |= (condition[i] & 1) << i;
  return bits;
#endif
}

// Fill whole words of a mask: chosen(j) says which neurons of the vector that begins at j are.
template <class F>
inline void mark(int padded, uint16_t *mask, F chosen) {
  for (int j = 0; j < padded; j += WORD) {
    unsigned word = 0;
#pragma GCC unroll 4
    for (int part = 0; part < WORD; part += LANES) word |= bits_of(chosen(j + part)) << part;
    mask[j / WORD] = word;
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// By the bits of a vector: the lanes that are set, one after another; and for each lane how many of them come before it,
// negative if it is set.
struct Places {
  uint8_t of_set[256][8] = {}, before[256][8] = {};
  constexpr Places() {
    for (int bits = 0; bits < 256; bits++)
      for (int lane = 0, set = 0; lane < 8; lane++) {
        before[bits][lane] = set | (bits >> lane & 1) << 7;
        if (bits >> lane & 1) of_set[bits][set++] = lane;
      }
  }
};
constexpr Places PLACES;
inline __m256i extended(const uint8_t *places) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(places)));
}
#endif

// The lanes whose bit is set move to the front.
inline Vector compress(Vector value, unsigned bits) {
#if defined(__AVX512F__)
  return _mm512_maskz_compress_ps(bits, value);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(value, extended(PLACES.of_set[bits]));
#else
  Vector packed{};
  for (int i = 0, to = 0; i < LANES; i++)
    if (bits >> i & 1) packed[to++] = value[i];
  return packed;
#endif
}

// Zero where the bit is not set.
inline Vector only(Vector value, unsigned bits) {
#ifdef __AVX512F__
  return _mm512_maskz_mov_ps(bits, value);
#elif defined(__AVX2__)
  return _mm256_blendv_ps(Vector{}, value, _mm256_castsi256_ps(extended(PLACES.before[bits])));
#else
  constexpr int32_t bit_of_lane[] = {1, 2, 4, 8, 16, 32, 64, 128};
  Integers bit;
  std::memcpy(&bit, bit_of_lane, sizeof(bit));
  return choose((all(int32_t(bits)) & bit) != 0, value, Vector{});
#endif
}

// Back to their places, among zeros.
inline Vector expand(Vector value, unsigned bits) {
#if defined(__AVX512F__)
  return _mm512_maskz_expand_ps(bits, value);
#elif defined(__AVX2__)
  return only(_mm256_permutevar8x32_ps(value, extended(PLACES.before[bits])), bits);
#else
  Vector spread{};
  for (int i = 0, from = 0; i < LANES; i++)
    if (bits >> i & 1) spread[i] = value[from++];
  return spread;
#endif
}

// The chosen of a row, one after another, and how many they are; `to` has room for a vector more.
template <class T>
int64_t compress_row(const T *row, const uint16_t *mask, int neurons, float *to) {
  float *const first = to;
  each_vector(neurons, [=, &to](int64_t j, auto count) {
    const unsigned bits = bits_at(mask, j);
    store(to, compress(load_first(row + j, count), bits));
    to += __builtin_popcount(bits);
  });
  return to - first;
}

// The indices of the chosen, ascending; `list` has room for a vector more.
void list_row(const uint16_t *mask, int neurons, uint16_t *list) {
  Integers lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = i;
  for (int j = 0; j < neurons; j += LANES) {
    const unsigned bits = bits_at(mask, j);
    const Integers packed = reinterpret_cast<Integers>(compress(reinterpret_cast<Vector>(lanes + j), bits));
    *reinterpret_cast<Halves *>(list) = __builtin_convertvector(packed, Halves);
    list += __builtin_popcount(bits);
  }
}

inline int total(Integers value) {
#ifdef __AVX512F__
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(value));
#else
  int sum = value[0];
  for (int i = 1; i < LANES; i++) sum += value[i];
  return sum;
#endif
}
inline int32_t smallest(Integers value) {
  value = held(value);  // otherwise the indices would keep the caller's vector in memory
  int32_t result = value[0];
  for (int i = 1; i < LANES; i++) result = std::min(result, value[i]);
  return result;
}

// Mark the neurons of the `kept` largest magnitudes, lower index first among equals; the bits of the smallest of them.
// NaN counts as infinity. Bits of floats without sign are ordered as they are. active: filled up with zeros. guess: of the
// result.
int32_t select(const float *active, int neurons, int kept, int32_t guess, uint16_t *mask) {
  constexpr int32_t INFINITE = 0x7f800000;  // the bits of NaN are larger
  constexpr int64_t TOP = INFINITE + 1;
  const int padded = rounded_up(neurons);
  const auto row = [&](int j) { return reinterpret_cast<Integers>(magnitude(load(active + j))); };
  // AVX2 has no "greater or equal".
  const auto reaches = [](Integers bits, int64_t pivot) { return bits > all(int32_t(pivot - 1)); };
  // How many reach `low` is at least `kept`, how many reach `high` is less, whatever the row holds.
  int64_t low = 0, high = TOP;
  int at_low = padded, at_high = 0;
  int64_t middle = guess, apart = std::max(guess / 512, 1 << 12);  // bits are logarithmic: some percent of the value
  for (int step = 0; at_low > kept && high - low > 1; step++) {
    const int64_t pivots[] = {std::clamp(middle - apart, low + 1, high - 1), std::clamp(middle, low + 1, high - 1),
                              std::clamp(middle + apart, low + 1, high - 1)};
    Integers reached[3] = {};
    for (int j = 0; j < padded; j += LANES) {
      const Integers here = row(j);
#pragma GCC unroll 3
      for (int i = 0; i < 3; i++) reached[i] -= reaches(here, pivots[i]);
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
      const int count = total(reached[i]);
      const bool enough = count >= kept, above = enough && pivots[i] > low, below = !enough && pivots[i] < high;
      low = above ? pivots[i] : low, at_low = above ? count : at_low;
      high = below ? pivots[i] : high, at_high = below ? count : at_high;
    }
    if (low == 0 || high == TOP) {  // the guess was far off: look ever farther
      apart = std::min(4 * apart, TOP);
      middle = low == 0 ? high - 2 * apart : low + 2 * apart;
    } else {  // where it should be if the magnitudes in between were spread evenly, and a bit to both sides
      const double between = at_low - at_high;
      middle = low + int64_t((high - low) * ((at_low - kept + 0.5) / between));
      apart = step % 4 == 3 ? (high - low) / 4 : int64_t((high - low) / (2 * std::sqrt(between))) + 1;
      if (step % 4 == 3) middle = (low + high) / 2;
    }
  }
  const Integers largest = all(std::numeric_limits<int32_t>::max());
  Integers least = largest;
  mark(padded, mask, [&](int j) {
    const Integers here = row(j), chosen = reaches(here, low), candidate = here | (~chosen & largest);
    least = candidate < least ? candidate : least;
    return chosen;
  });
  // Several may have the magnitude `low`, and not all of them fit: the last go.
  for (int j = padded - 1; at_low > kept; j--)
    if (std::min(row(j / LANES * LANES)[j % LANES], INFINITE) == low) mask[j / WORD] &= ~(1 << j % WORD), at_low--;
  return std::min(smallest(least), INFINITE);
}

// The scores of a row: magnitude plus bias, which is not negative; filled up with zeros. Without a bias the row itself has the
// magnitudes of its scores.
inline const float *scores_of(const float *active, const float *bias, int neurons, float *scores) {
  if (!bias) return active;
  each_vector(neurons, [=](int64_t j, auto count) { store(scores + j, magnitude(load(active + j)) + load_first(bias + j, count)); });
  std::fill(scores + neurons, scores + rounded_up(neurons), 0.0f);
  return scores;
}

constexpr int32_t FIRST_GUESS = 0x3e000000;  // 1/8; afterwards the threshold of the row before

// Of neurons that a row keeps, hidden = act(gate) * up * prob in place of its gradient, and the gradients of the factors;
// returned is that of prob.
template <class T>
float differentiate(int activation, int64_t kept, float prob, float *hidden, const T *gates, const T *ups, float *dgates,
                    float *dups) {
  return dispatch(activation, [=](auto function) {
    Vector dprob{};
    each_vector(kept, [=, &dprob](int64_t p, auto count) {
      const Vector dhidden = load_first(hidden + p, count), gate = load_first(gates + p, count);
      const Vector up = load_first(ups + p, count), value = function.value(gate);
      dprob += dhidden * value * up;
      store_first(dgates + p, dhidden * up * prob * function.slope(gate), count);
      store_first(dups + p, dhidden * value * prob, count);
      store_first(hidden + p, value * up * prob, count);
    });
    return total(dprob);
  });
}

constexpr auto nothing = [](int64_t) {};

// active = act(gate) for a row or a part of it, filled up with zeros to whole words; may be done in place.
// meanwhile(j): what else to do at every word.
template <class T, class F = decltype(nothing)>
void activate(int activation, const T *gate, int neurons, float *active, F meanwhile = nothing) {
  dispatch(activation, [&](auto function) {
    each_vector(neurons, [=](int64_t j, auto count) {
      if (j % WORD == 0) meanwhile(j);
      store(active + j, function.value(load_first(gate + j, count)));
    });
  });
  // Sigmoid(0) is not 0.
  std::fill(active + neurons, active + rounded_up(neurons), 0.0f);
}

}  // namespace
