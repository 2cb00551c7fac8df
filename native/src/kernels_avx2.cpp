// Kernels for processors with AVX2. Compiled with it on.
#if defined(__x86_64__)

#if !defined(__AVX2__)
#error "compile this file with -mavx2"
#endif

#include <immintrin.h>

#include "transforms_vector.hpp"

namespace blindtail {
namespace {

struct Avx2 {
  using Vec = __m256i;
  static constexpr const char* kName = "avx2";
  static constexpr int kLogWords = 3;
  static constexpr std::size_t kWords = 8;
  static constexpr int kDotVectors = 2;  // 8 sums in 16 registers
  static constexpr int kMaxLayers = 2;   // 4 values and 6 factors in 16 registers

  BLINDTAIL_INLINE static const __m256i* at256(const u32* x) {
    return static_cast<const __m256i*>(static_cast<const void*>(x));
  }
  BLINDTAIL_INLINE static const __m128i* at128(const u32* x) {
    return static_cast<const __m128i*>(static_cast<const void*>(x));
  }
  BLINDTAIL_INLINE static Vec load(const u32* x) { return _mm256_load_si256(at256(x)); }
  BLINDTAIL_INLINE static Vec load_unaligned(const u32* x) { return _mm256_loadu_si256(at256(x)); }
  BLINDTAIL_INLINE static void store(u32* x, Vec v) {
    _mm256_store_si256(static_cast<__m256i*>(static_cast<void*>(x)), v);
  }
  BLINDTAIL_INLINE static Vec set(u32 x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  BLINDTAIL_INLINE static Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  BLINDTAIL_INLINE static Vec sub(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
  BLINDTAIL_INLINE static Vec add64(Vec a, Vec b) { return _mm256_add_epi64(a, b); }
  BLINDTAIL_INLINE static Vec sub64(Vec a, Vec b) { return _mm256_sub_epi64(a, b); }
  BLINDTAIL_INLINE static Vec min(Vec a, Vec b) { return _mm256_min_epu32(a, b); }
  BLINDTAIL_INLINE static Vec mul_low(Vec a, Vec b) { return _mm256_mullo_epi32(a, b); }
  BLINDTAIL_INLINE static Vec mul_even(Vec a, Vec b) { return _mm256_mul_epu32(a, b); }
  BLINDTAIL_INLINE static Vec even(Vec a) {
    return _mm256_castps_si256(_mm256_moveldup_ps(_mm256_castsi256_ps(a)));
  }
  /// Odd lanes in even ones, for mul_even.
  BLINDTAIL_INLINE static Vec odd(Vec a) {
    return _mm256_castps_si256(_mm256_movehdup_ps(_mm256_castsi256_ps(a)));
  }
  BLINDTAIL_INLINE static Vec join_high(Vec even, Vec odds) {
    return _mm256_blend_epi32(odd(even), odds, 0xaa);
  }
  /// Keeps gcc from reassociating sums, which would undo the sharing of x.
  BLINDTAIL_INLINE static Vec keep(Vec x) {
    asm("" : "+x"(x));
    return x;
  }
  /// x > bound ? x + y : x, for x and bound below 2^31.
  BLINDTAIL_INLINE static Vec add_where_above(Vec x, Vec bound, Vec y) {
    return _mm256_add_epi32(x, _mm256_and_si256(_mm256_cmpgt_epi32(x, bound), y));
  }
  /// By the index's low three bits.
  BLINDTAIL_INLINE static Vec select(Vec x, Vec index) { return _mm256_permutevar8x32_epi32(x, index); }
  BLINDTAIL_INLINE static void prefetch(const u32* x) { _mm_prefetch(x, _MM_HINT_T0); }

  // The last three layers work on 16 words in two registers; see kernels_avx512.cpp.

  /// Register bit with lane bit kBit; its own inverse.
  template <int kBit>
  BLINDTAIL_INLINE static void swap(Vec& x, Vec& y) {
    const Vec a = x, b = y;
    if constexpr (kBit == 2) {
      x = _mm256_permute2x128_si256(a, b, 0x20);
      y = _mm256_permute2x128_si256(a, b, 0x31);
    } else if constexpr (kBit == 1) {
      x = _mm256_unpacklo_epi64(a, b);
      y = _mm256_unpackhi_epi64(a, b);
    } else {
      x = _mm256_blend_epi32(a, even(b), 0xaa);
      y = _mm256_blend_epi32(odd(a), b, 0xaa);
    }
  }

  /// Register bit i0, lane bits i3 i2 i1, from and to register bit i3.
  BLINDTAIL_INLINE static void enter(Vec& x, Vec& y) {
    swap<2>(x, y);
    const __m256 a = _mm256_castsi256_ps(x), b = _mm256_castsi256_ps(y);
    x = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    y = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
  }
  BLINDTAIL_INLINE static void leave(Vec& x, Vec& y) {
    const Vec a = x, b = y;
    x = _mm256_unpacklo_epi32(a, b);
    y = _mm256_unpackhi_epi32(a, b);
    swap<2>(x, y);
  }

  /// Factors of the layer 2^kBit words apart for the 16 words at 16 b.
  template <int kBit>
  BLINDTAIL_INLINE static auto factor(Roots r, std::size_t n, std::size_t b) {
    const std::size_t i = (n + 16 * b) >> (kBit + 1);
    const u32 *value = r.value + i, *companion = r.companion + i;
    if constexpr (kBit == 2) {
      const Vec index = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
      return Factor<Avx2>{select(_mm256_castsi128_si256(_mm_loadl_epi64(at128(value))), index),
                          select(_mm256_castsi128_si256(_mm_loadl_epi64(at128(companion))), index)};
    } else if constexpr (kBit == 1) {
      // Companions are read from even lanes alone.
      return Factor<Avx2>{even(_mm256_cvtepu32_epi64(_mm_load_si128(at128(value)))),
                          _mm256_cvtepu32_epi64(_mm_load_si128(at128(companion)))};
    } else {
      const Vec companions = load(companion);
      return LaneFactor<Avx2>{load(value), companions, odd(companions)};
    }
  }
};

}  // namespace

const Kernels<u32>& avx2_kernels() { return vector_kernels<Avx2>(); }

}  // namespace blindtail

#endif
