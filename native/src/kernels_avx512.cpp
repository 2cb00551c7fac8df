// Kernels for processors with AVX-512 F, DQ, BW and VL. Compiled with these four on.
#if defined(__x86_64__)

#if !defined(__AVX512F__) || !defined(__AVX512DQ__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "compile this file with -mavx512f -mavx512dq -mavx512bw -mavx512vl"
#endif

#include <immintrin.h>

#include "transforms_vector.hpp"

namespace blindtail {
namespace {

struct Avx512 {
  using Vec = __m512i;
  static constexpr const char* kName = "avx512";
  static constexpr int kLogWords = 4;
  static constexpr std::size_t kWords = 16;
  static constexpr int kDotVectors = 4;  // 16 sums in 32 registers
  static constexpr int kMaxLayers = 3;   // 8 values and 14 factors in 32 registers

  BLINDTAIL_INLINE static const __m128i* at128(const u32* x) {
    return static_cast<const __m128i*>(static_cast<const void*>(x));
  }
  BLINDTAIL_INLINE static const __m256i* at256(const u32* x) {
    return static_cast<const __m256i*>(static_cast<const void*>(x));
  }
  BLINDTAIL_INLINE static Vec load(const u32* x) { return _mm512_load_si512(x); }
  BLINDTAIL_INLINE static Vec load_unaligned(const u32* x) { return _mm512_loadu_si512(x); }
  BLINDTAIL_INLINE static void store(u32* x, Vec v) { _mm512_store_si512(x, v); }
  BLINDTAIL_INLINE static Vec set(u32 x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  BLINDTAIL_INLINE static Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  BLINDTAIL_INLINE static Vec sub(Vec a, Vec b) { return _mm512_sub_epi32(a, b); }
  BLINDTAIL_INLINE static Vec add64(Vec a, Vec b) { return _mm512_add_epi64(a, b); }
  BLINDTAIL_INLINE static Vec sub64(Vec a, Vec b) { return _mm512_sub_epi64(a, b); }
  BLINDTAIL_INLINE static Vec min(Vec a, Vec b) { return _mm512_min_epu32(a, b); }
  BLINDTAIL_INLINE static Vec mul_low(Vec a, Vec b) { return _mm512_mullo_epi32(a, b); }
  BLINDTAIL_INLINE static Vec mul_even(Vec a, Vec b) { return _mm512_mul_epu32(a, b); }
  BLINDTAIL_INLINE static Vec even(Vec a) {
    return _mm512_castps_si512(_mm512_moveldup_ps(_mm512_castsi512_ps(a)));
  }
  /// Odd lanes in even ones, for mul_even.
  BLINDTAIL_INLINE static Vec odd(Vec a) {
    return _mm512_castps_si512(_mm512_movehdup_ps(_mm512_castsi512_ps(a)));
  }
  BLINDTAIL_INLINE static Vec join_high(Vec even, Vec odd) {
    return _mm512_castps_si512(
        _mm512_mask_movehdup_ps(_mm512_castsi512_ps(odd), 0x5555, _mm512_castsi512_ps(even)));
  }
  /// Keeps gcc from reassociating sums, which would undo the sharing of x.
  BLINDTAIL_INLINE static Vec keep(Vec x) {
    asm("" : "+v"(x));
    return x;
  }
  /// x > bound ? x + y : x, for x and bound below 2^31.
  BLINDTAIL_INLINE static Vec add_where_above(Vec x, Vec bound, Vec y) {
    return _mm512_mask_add_epi32(x, _mm512_cmpgt_epi32_mask(x, bound), x, y);
  }
  BLINDTAIL_INLINE static Vec select(Vec x, Vec index) { return _mm512_permutexvar_epi32(index, x); }
  BLINDTAIL_INLINE static void prefetch(const u32* x) { _mm_prefetch(x, _MM_HINT_T0); }

  // The last four layers work on 32 words in two registers. Write a word's place among them as bits
  // i4 i3 i2 i1 i0: at first i4 says which register. Each swap exchanges the register's bit with a
  // bit of the lane, so that partners of a layer face each other; the lane's other bits keep their
  // order, so lane bits count blocks and roots are read as they lie.

  /// Register bit with lane bit kBit; its own inverse.
  template <int kBit>
  BLINDTAIL_INLINE static void swap(Vec& x, Vec& y) {
    const Vec a = x, b = y;
    if constexpr (kBit == 3) {
      x = _mm512_shuffle_i64x2(a, b, 0x44);
      y = _mm512_shuffle_i64x2(a, b, 0xee);
    } else if constexpr (kBit == 2) {
      x = _mm512_mask_shuffle_i64x2(a, 0xcc, b, b, 0xa0);
      y = _mm512_mask_shuffle_i64x2(b, 0x33, a, a, 0xf5);
    } else if constexpr (kBit == 1) {
      x = _mm512_unpacklo_epi64(a, b);
      y = _mm512_unpackhi_epi64(a, b);
    } else {
      const __m512 c = _mm512_castsi512_ps(a), d = _mm512_castsi512_ps(b);
      x = _mm512_castps_si512(_mm512_mask_moveldup_ps(c, 0xaaaa, d));
      y = _mm512_castps_si512(_mm512_mask_movehdup_ps(d, 0x5555, c));
    }
  }

  /// Register bit i0, lane bits i4 i3 i2 i1, from and to register bit i4.
  BLINDTAIL_INLINE static void enter(Vec& x, Vec& y) {
    const Vec a = x, b = y;
    x = _mm512_permutex2var_epi32(
        a, _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), b);
    y = _mm512_permutex2var_epi32(
        a, _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1), b);
  }
  BLINDTAIL_INLINE static void leave(Vec& x, Vec& y) {
    const Vec a = x, b = y;
    x = _mm512_permutex2var_epi32(a, _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0),
                                  b);
    y = _mm512_permutex2var_epi32(
        a, _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8), b);
  }

  /// Factors of the layer 2^kBit words apart for the 32 words at 32 b.
  template <int kBit>
  BLINDTAIL_INLINE static auto factor(Roots r, std::size_t n, std::size_t b) {
    const std::size_t i = (n + 32 * b) >> (kBit + 1);
    const u32 *value = r.value + i, *companion = r.companion + i;
    if constexpr (kBit == 3) {
      const Vec index = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
      return Factor<Avx512>{select(_mm512_castsi128_si512(_mm_loadl_epi64(at128(value))), index),
                            select(_mm512_castsi128_si512(_mm_loadl_epi64(at128(companion))), index)};
    } else if constexpr (kBit == 2) {
      const Vec index = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
      return Factor<Avx512>{select(_mm512_castsi128_si512(_mm_load_si128(at128(value))), index),
                            select(_mm512_castsi128_si512(_mm_load_si128(at128(companion))), index)};
    } else if constexpr (kBit == 1) {
      // Companions are read from even lanes alone.
      return Factor<Avx512>{even(_mm512_cvtepu32_epi64(_mm256_load_si256(at256(value)))),
                            _mm512_cvtepu32_epi64(_mm256_load_si256(at256(companion)))};
    } else {
      const Vec companions = load(companion);
      return LaneFactor<Avx512>{load(value), companions, odd(companions)};
    }
  }
};

}  // namespace

const Kernels<u32>& avx512_kernels() { return vector_kernels<Avx512>(); }

}  // namespace blindtail

#endif
