// CodecKernels in AVX-512 (F, DQ, BW, VL). Compiled with those flags alone; see codec_kernels.cpp.
#include <immintrin.h>

#include "blake2b.hpp"
#include "codec_kernels.hpp"

namespace blindtail {
namespace {
namespace avx512 {

struct Lanes {
  using Vec = __m512i;
  static constexpr std::size_t kLanes = 8;
  static Vec all(u64 x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static Vec load(const u64* p) { return _mm512_loadu_si512(p); }
  static Vec add(Vec a, Vec b) { return _mm512_add_epi64(a, b); }
  static Vec exclusive_or(Vec a, Vec b) { return _mm512_xor_si512(a, b); }
  template <int K>
  static Vec rotate(Vec a) {
    return _mm512_ror_epi64(a, K);
  }
  static void store_states(const Vec h[8], u64* out) {
    // An 8 x 8 transpose: pairs of words, then of 128-bit and of 256-bit parts.
    Vec t[8], s[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm512_unpacklo_epi64(h[2 * i], h[2 * i + 1]);      // lanes 0 2 4 6
      t[2 * i + 1] = _mm512_unpackhi_epi64(h[2 * i], h[2 * i + 1]);  // lanes 1 3 5 7
    }
    for (int odd = 0; odd < 2; ++odd) {
      for (int i = 0; i < 2; ++i) {
        s[4 * odd + i] = _mm512_shuffle_i64x2(t[4 * i + odd], t[4 * i + 2 + odd], 0x88);      // lanes 0 4
        s[4 * odd + 2 + i] = _mm512_shuffle_i64x2(t[4 * i + odd], t[4 * i + 2 + odd], 0xdd);  // lanes 2 6
      }
      for (int i = 0; i < 2; ++i) {
        const Vec a = s[4 * odd + 2 * i], b = s[4 * odd + 2 * i + 1];
        _mm512_storeu_si512(out + 8 * (2 * i + odd), _mm512_shuffle_i64x2(a, b, 0x88));
        _mm512_storeu_si512(out + 8 * (2 * i + odd + 4), _mm512_shuffle_i64x2(a, b, 0xdd));
      }
    }
  }
};

bool any_at_least(const u64* in, std::size_t n, u64 bound) {
  const __m512i limit = Lanes::all(bound);
  __mmask8 any = 0;
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) any |= _mm512_cmpge_epu64_mask(Lanes::load(in + i), limit);
  const __mmask8 rest = static_cast<__mmask8>((1u << (n - i)) - 1);
  any |= _mm512_mask_cmpge_epu64_mask(rest, _mm512_maskz_loadu_epi64(rest, in + i), limit);
  return any != 0;
}

void reduce(const Modulus<u32>& m, u64 offset, const u64* in, std::size_t n, u32* out) {
  // x = high 2^32 + low. t = high (2^64 mod q) + low (2^32 mod q) < 2q 2^32; t 2^-32 mod q is x mod q
  // (Montgomery), as (t - s) / 2^32 + q in (0, 3q) with s = (t q^-1 mod 2^32) q.
  const __m512i add = Lanes::all(offset), one = Lanes::all(m.one), square = Lanes::all(m.square);
  const __m512i inverse = Lanes::all(m.inverse), q = Lanes::all(m.q), q_high = Lanes::all(u64{m.q} << 32);
  const __m512i q32 = _mm512_set1_epi32(static_cast<int>(m.q));
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const auto half = [&](__m512i x) {
    x = _mm512_add_epi64(x, add);
    const __m512i t =
        _mm512_add_epi64(_mm512_mul_epu32(_mm512_srli_epi64(x, 32), square), _mm512_mul_epu32(x, one));
    const __m512i s = _mm512_mul_epu32(_mm512_mul_epu32(t, inverse), q);
    return _mm512_add_epi64(_mm512_sub_epi64(t, s), q_high);
  };
  for (std::size_t i = 0; i < n; i += 16) {
    const std::size_t left = n - i;
    const auto keep = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1);
    const __m512i a = half(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(keep), in + i));
    const __m512i b = half(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(keep >> 8), in + i + 8));
    __m512i r = _mm512_permutex2var_epi32(a, odd, b);
    r = _mm512_min_epu32(r, _mm512_sub_epi32(r, q32));
    r = _mm512_min_epu32(r, _mm512_sub_epi32(r, q32));
    _mm512_mask_storeu_epi32(out + i, keep, r);
  }
}

std::size_t unpack(const std::uint8_t* data, std::size_t bytes, std::size_t count, int width, u32 most,
                   u32* out, bool* good) {
  // 16 values are 2 width bytes: each lies in one 32-bit word of them, or in two neighbours.
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i bit = _mm512_mullo_epi32(lane, _mm512_set1_epi32(width));
  const __m512i low = _mm512_srli_epi32(bit, 5), right = _mm512_and_si512(bit, _mm512_set1_epi32(31));
  const __m512i high = _mm512_min_epu32(_mm512_add_epi32(low, _mm512_set1_epi32(1)), _mm512_set1_epi32(15));
  const __m512i left = _mm512_sub_epi32(_mm512_set1_epi32(32), right);  // by 32: nothing remains
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffffffffu >> (32 - width)));
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(most));
  const std::size_t step = 2 * static_cast<std::size_t>(width);
  std::size_t done = 0, at = 0;
  __mmask16 bad = 0;
  for (; done + 16 <= count && at + 64 <= bytes; done += 16, at += step) {
    const __m512i x = _mm512_loadu_si512(data + at);
    __m512i v = _mm512_or_si512(_mm512_srlv_epi32(_mm512_permutexvar_epi32(low, x), right),
                                _mm512_sllv_epi32(_mm512_permutexvar_epi32(high, x), left));
    v = _mm512_and_si512(v, mask);
    bad |= _mm512_cmpgt_epu32_mask(v, limit);
    _mm512_storeu_si512(out + done, v);
  }
  if (bad != 0) *good = false;
  return done;
}

}  // namespace avx512
}  // namespace

const CodecKernels& avx512_codec() {
  static const CodecKernels table{"avx512", blake2b::blocks<avx512::Lanes>, avx512::any_at_least,
                                  avx512::reduce, avx512::unpack};
  return table;
}

}  // namespace blindtail
