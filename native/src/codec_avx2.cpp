// CodecKernels in AVX2. Compiled with that flag alone; see codec_kernels.cpp.
#include <immintrin.h>

#include "blake2b.hpp"
#include "codec_kernels.hpp"

namespace blindtail {
namespace {
namespace avx2 {

__m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

struct Lanes {
  using Vec = __m256i;
  static constexpr std::size_t kLanes = 4;
  static Vec all(u64 x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static Vec load(const u64* p) { return load256(p); }
  static Vec add(Vec a, Vec b) { return _mm256_add_epi64(a, b); }
  static Vec exclusive_or(Vec a, Vec b) { return _mm256_xor_si256(a, b); }
  template <int K>
  static Vec rotate(Vec a) {
    if constexpr (K == 32) return _mm256_shuffle_epi32(a, 0xb1);
    if constexpr (K == 63) return _mm256_or_si256(_mm256_add_epi64(a, a), _mm256_srli_epi64(a, 63));
    // By whole bytes: byte i of a word comes from byte i + K / 8.
    const auto from = [](int shift) {
      const auto word = [shift](int base) {
        u64 x = 0;
        for (int i = 0; i < 8; ++i) x |= static_cast<u64>(base + (i + shift) % 8) << (8 * i);
        return static_cast<long long>(x);
      };
      return _mm256_set_epi64x(word(8), word(0), word(8), word(0));
    };
    return _mm256_shuffle_epi8(a, from(K / 8));
  }
  static void store_states(const Vec h[8], u64* out) {
    for (int half = 0; half < 2; ++half) {
      const Vec* g = h + 4 * half;
      const Vec t0 = _mm256_unpacklo_epi64(g[0], g[1]), t1 = _mm256_unpackhi_epi64(g[0], g[1]);
      const Vec t2 = _mm256_unpacklo_epi64(g[2], g[3]), t3 = _mm256_unpackhi_epi64(g[2], g[3]);
      u64* to = out + 4 * half;
      store256(to, _mm256_permute2x128_si256(t0, t2, 0x20));
      store256(to + 8, _mm256_permute2x128_si256(t1, t3, 0x20));
      store256(to + 16, _mm256_permute2x128_si256(t0, t2, 0x31));
      store256(to + 24, _mm256_permute2x128_si256(t1, t3, 0x31));
    }
  }
};

bool any_at_least(const u64* in, std::size_t n, u64 bound) {
  if (bound == 0) return n != 0;
  // Signed comparison of words with their top bit flipped.
  const __m256i flip = Lanes::all(u64{1} << 63), limit = Lanes::all((bound - 1) ^ (u64{1} << 63));
  __m256i any = _mm256_setzero_si256();
  std::size_t i = 0;
  for (; i + 4 <= n; i += 4)
    any = _mm256_or_si256(any, _mm256_cmpgt_epi64(_mm256_xor_si256(load256(in + i), flip), limit));
  bool found = _mm256_testz_si256(any, any) == 0;
  for (; i < n; ++i) found |= in[i] >= bound;
  return found;
}

void reduce(const Modulus<u32>& m, u64 offset, const u64* in, std::size_t n, u32* out) {
  // As in codec_avx512.cpp.
  const __m256i add = Lanes::all(offset), one = Lanes::all(m.one), square = Lanes::all(m.square);
  const __m256i inverse = Lanes::all(m.inverse), q = Lanes::all(m.q), q_high = Lanes::all(u64{m.q} << 32);
  const __m256i q32 = _mm256_set1_epi32(static_cast<int>(m.q));
  const __m256i odd = _mm256_set_epi32(7, 5, 3, 1, 7, 5, 3, 1);
  const auto half = [&](__m256i x) {
    x = _mm256_add_epi64(x, add);
    const __m256i t =
        _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(x, 32), square), _mm256_mul_epu32(x, one));
    const __m256i s = _mm256_mul_epu32(_mm256_mul_epu32(t, inverse), q);
    return _mm256_permutevar8x32_epi32(_mm256_add_epi64(_mm256_sub_epi64(t, s), q_high), odd);
  };
  std::size_t i = 0;
  const auto group = [&](const u64* from, u32* to) {
    __m256i r = _mm256_blend_epi32(half(load256(from)), half(load256(from + 4)), 0xf0);
    r = _mm256_min_epu32(r, _mm256_sub_epi32(r, q32));
    store256(to, _mm256_min_epu32(r, _mm256_sub_epi32(r, q32)));
  };
  for (; i + 8 <= n; i += 8) group(in + i, out + i);
  if (i == n) return;
  u64 from[8] = {};
  u32 to[8];
  for (std::size_t j = 0; j < n - i; ++j) from[j] = in[i + j];
  group(from, to);
  for (std::size_t j = 0; j < n - i; ++j) out[i + j] = to[j];
}

std::size_t unpack(const std::uint8_t* data, std::size_t bytes, std::size_t count, int width, u32 most,
                   u32* out, bool* good) {
  // As in codec_avx512.cpp: 8 values are `width` bytes.
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i bit = _mm256_mullo_epi32(lane, _mm256_set1_epi32(width));
  const __m256i low = _mm256_srli_epi32(bit, 5), right = _mm256_and_si256(bit, _mm256_set1_epi32(31));
  const __m256i high = _mm256_min_epu32(_mm256_add_epi32(low, _mm256_set1_epi32(1)), _mm256_set1_epi32(7));
  const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(32), right);
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffffffffu >> (32 - width)));
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(most));
  __m256i fits = _mm256_set1_epi32(-1);
  const std::size_t step = static_cast<std::size_t>(width);
  std::size_t done = 0, at = 0;
  for (; done + 8 <= count && at + 32 <= bytes; done += 8, at += step) {
    const __m256i x = load256(data + at);
    __m256i v = _mm256_or_si256(_mm256_srlv_epi32(_mm256_permutevar8x32_epi32(x, low), right),
                                _mm256_sllv_epi32(_mm256_permutevar8x32_epi32(x, high), left));
    v = _mm256_and_si256(v, mask);
    fits = _mm256_and_si256(fits, _mm256_cmpeq_epi32(_mm256_min_epu32(v, limit), v));
    store256(out + done, v);
  }
  if (_mm256_movemask_epi8(fits) != -1) *good = false;
  return done;
}

}  // namespace avx2
}  // namespace

const CodecKernels& avx2_codec() {
  static const CodecKernels table{"avx2", blake2b::blocks<avx2::Lanes>, avx2::any_at_least, avx2::reduce,
                                  avx2::unpack};
  return table;
}

}  // namespace blindtail
