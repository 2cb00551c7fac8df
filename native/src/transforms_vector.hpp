// Number-theoretic transforms on 32-bit lanes, for any vector type V. Included as kernels_vector.hpp is.
//
// Far layers, whose partners are a vector or more apart, work on whole registers, up to three layers
// for each load and store. Near layers move words between two registers so that partners face each
// other; several pairs at once, as one pair's chain of operations is too long to fill the processor.
// (Near layers in one pass with far ones measure slower: too many registers in use.)
#pragma once

#include "kernels_vector.hpp"

namespace blindtail {
namespace {

/// A factor for each lane; `odd` holds the companions of odd lanes in even ones.
template <class V>
struct LaneFactor {
  Vec<V> value, even, odd;
};

template <class V>
BLINDTAIL_INLINE Vec<V> times(Vec<V> x, const LaneFactor<V>& f, Vec<V> q) {
  const Vec<V> quotient = high_product<V>(x, f.even, f.odd);
  return V::keep(V::sub(V::mul_low(x, f.value), V::mul_low(quotient, q)));
}

/// Below 4q to below 4q (Harvey); y any word.
template <class V, class F>
BLINDTAIL_INLINE void forward(Vec<V>& x, Vec<V>& y, const F& f, const Lanes<V>& c) {
  const Vec<V> a = reduce_once<V>(x, c.two_q), b = times<V>(y, f, c.q);
  x = V::add(a, b);
  y = V::sub(V::add(a, c.two_q), b);
}

/// Below 2q to below 2q.
template <class V, class F>
BLINDTAIL_INLINE void backward(Vec<V>& x, Vec<V>& y, const F& f, const Lanes<V>& c) {
  const Vec<V> sum = V::add(x, y), difference = V::sub(V::add(x, c.two_q), y);
  x = reduce_once<V>(sum, c.two_q);
  y = times<V>(difference, f, c.q);
}

/// Values and companions, in the order of Prime::roots.
struct Roots {
  const u32 *value, *companion;
};

/// Factors of kLayers layers on 2^kLayers registers of block b of the widest layer, of `blocks`:
/// f[m + j] is block j's of the layer with m blocks.
template <class V, int kLayers>
BLINDTAIL_INLINE void load_factors(Factor<V>* f, Roots r, std::size_t blocks, std::size_t b) {
#pragma GCC unroll 8
  for (int k = 1; k < 1 << kLayers; ++k) {
    const int layer = k >= 4 ? 2 : k >= 2 ? 1 : 0;
    const std::size_t at = ((blocks + b) << layer) + static_cast<std::size_t>(k - (1 << layer));
    f[k] = {V::set(r.value[at]), V::set(r.companion[at])};
  }
}

template <class V, int kLayers>
BLINDTAIL_INLINE void forward_layers(Vec<V>* x, const Factor<V>* f, const Lanes<V>& c) {
#pragma GCC unroll 3
  for (int layer = 0; layer < kLayers; ++layer) {
    const int apart = 1 << (kLayers - 1 - layer);
#pragma GCC unroll 4
    for (int k = 0; k < 1 << (kLayers - 1); ++k) {
      const int block = k / apart, at = 2 * apart * block + k % apart;
      forward<V>(x[at], x[at + apart], f[(1 << layer) + block], c);
    }
  }
}

/// kLast: these include the transform's last layer, which multiplies by N^-1 = f[0].
template <class V, int kLayers, bool kLast>
BLINDTAIL_INLINE void backward_layers(Vec<V>* x, const Factor<V>* f, const Lanes<V>& c) {
#pragma GCC unroll 3
  for (int layer = kLayers - 1; layer >= 0; --layer) {
    const int apart = 1 << (kLayers - 1 - layer);
#pragma GCC unroll 4
    for (int k = 0; k < 1 << (kLayers - 1); ++k) {
      const int block = k / apart, at = 2 * apart * block + k % apart;
      if (kLast && layer == 0) {
        const Vec<V> sum = V::add(x[at], x[at + apart]);
        const Vec<V> difference = V::sub(V::add(x[at], c.two_q), x[at + apart]);
        x[at] = reduce_once<V>(times<V>(sum, f[0], c.q), c.q);
        x[at + apart] = reduce_once<V>(times<V>(difference, f[1], c.q), c.q);
      } else {
        backward<V>(x[at], x[at + apart], f[(1 << layer) + block], c);
      }
    }
  }
}

/// One layer within vectors, partners 2^kBit words apart, on kPairs pairs of registers from pair b on.
template <class V, int kBit, std::size_t kPairs>
BLINDTAIL_INLINE void near_forward(Vec<V>* x, Roots r, std::size_t n, std::size_t b, const Lanes<V>& c) {
#pragma GCC unroll 4
  for (std::size_t k = 0; k < kPairs; ++k) {
    V::template swap<kBit>(x[2 * k], x[2 * k + 1]);
    forward<V>(x[2 * k], x[2 * k + 1], V::template factor<kBit>(r, n, b + k), c);
  }
  if constexpr (kBit > 0) near_forward<V, kBit - 1, kPairs>(x, r, n, b, c);
}

template <class V, int kBit, std::size_t kPairs>
BLINDTAIL_INLINE void near_backward(Vec<V>* x, Roots r, std::size_t n, std::size_t b, const Lanes<V>& c) {
#pragma GCC unroll 4
  for (std::size_t k = 0; k < kPairs; ++k) {
    backward<V>(x[2 * k], x[2 * k + 1], V::template factor<kBit>(r, n, b + k), c);
    V::template swap<kBit>(x[2 * k], x[2 * k + 1]);
  }
  if constexpr (kBit + 1 < V::kLogWords) near_backward<V, kBit + 1, kPairs>(x, r, n, b, c);
}

/// How many of the far layers left the next pass takes.
template <class V>
BLINDTAIL_INLINE int next_layers(int left) {
  return V::kMaxLayers >= 3 && left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
}

/// kLayers layers, of which the first has `blocks` blocks.
template <class V, int kLayers>
void forward_pass(const Prime<u32>& p, u32* out, const u32* in, std::size_t blocks) {
  constexpr int kCount = 1 << kLayers;
  const Lanes<V> c(p.mod);
  const Roots r = {p.roots.data(), p.roots_shoup.data()};
  const std::size_t t = p.n / blocks / kCount;
  for (std::size_t b = 0; b < blocks; ++b) {
    Factor<V> f[kCount];
    load_factors<V, kLayers>(f, r, blocks, b);
    const std::size_t start = b * t * kCount;
    for (std::size_t i = start; i < start + t; i += V::kWords) {
      Vec<V> x[kCount];
#pragma GCC unroll 8
      for (std::size_t k = 0; k < kCount; ++k) x[k] = V::load(in + i + k * t);
      forward_layers<V, kLayers>(x, f, c);
#pragma GCC unroll 8
      for (std::size_t k = 0; k < kCount; ++k) V::store(out + i + k * t, x[k]);
    }
  }
}

/// All near layers of kPairs pairs from pair b on; canonical results.
template <class V, std::size_t kPairs>
BLINDTAIL_INLINE void forward_pairs(const Lanes<V>& c, Roots r, std::size_t n, u32* out, std::size_t b) {
  constexpr std::size_t kCount = 2 * kPairs;
  u32* words = out + 2 * b * V::kWords;
  Vec<V> x[kCount];
#pragma GCC unroll 8
  for (std::size_t k = 0; k < kCount; ++k) x[k] = V::load(words + k * V::kWords);
  near_forward<V, V::kLogWords - 1, kPairs>(x, r, n, b, c);
#pragma GCC unroll 4
  for (std::size_t k = 0; k < kCount; k += 2) {
    x[k] = reduce_once<V>(reduce_once<V>(x[k], c.two_q), c.q);
    x[k + 1] = reduce_once<V>(reduce_once<V>(x[k + 1], c.two_q), c.q);
    V::leave(x[k], x[k + 1]);
    V::store(words + k * V::kWords, x[k]);
    V::store(words + (k + 1) * V::kWords, x[k + 1]);
  }
}

template <class V, std::size_t kPairs>
BLINDTAIL_INLINE void backward_pairs(const Lanes<V>& c, Roots r, std::size_t n, u32* out, const u32* in,
                                     std::size_t b) {
  constexpr std::size_t kCount = 2 * kPairs;
  const std::size_t start = 2 * b * V::kWords;
  Vec<V> x[kCount];
#pragma GCC unroll 4
  for (std::size_t k = 0; k < kCount; k += 2) {
    x[k] = V::load(in + start + k * V::kWords);
    x[k + 1] = V::load(in + start + (k + 1) * V::kWords);
    V::enter(x[k], x[k + 1]);
  }
  near_backward<V, 0, kPairs>(x, r, n, b, c);
#pragma GCC unroll 8
  for (std::size_t k = 0; k < kCount; ++k) V::store(out + start + k * V::kWords, x[k]);
}

constexpr std::size_t kPairsAtOnce = 4;

template <class V>
void ntt(const Prime<u32>& p, u32* out, const u32* in) {
  for (int done = 0, left = p.log_n - V::kLogWords; left > 0;) {
    const std::size_t blocks = std::size_t{1} << done;
    const int layers = next_layers<V>(left);
    if (layers == 3)
      forward_pass<V, 3>(p, out, in, blocks);
    else if (layers == 2)
      forward_pass<V, 2>(p, out, in, blocks);
    else
      forward_pass<V, 1>(p, out, in, blocks);
    done += layers;
    left -= layers;
    in = out;
  }
  const Lanes<V> c(p.mod);
  const Roots r = {p.roots.data(), p.roots_shoup.data()};
  const std::size_t pairs = p.n / (2 * V::kWords);
  std::size_t b = 0;
  for (; b + kPairsAtOnce <= pairs; b += kPairsAtOnce) forward_pairs<V, kPairsAtOnce>(c, r, p.n, out, b);
  for (; b < pairs; ++b) forward_pairs<V, 1>(c, r, p.n, out, b);
}

/// kLayers layers, of which the last has `blocks` blocks.
template <class V, int kLayers, bool kLast>
BLINDTAIL_INLINE void backward_loop(const Prime<u32>& p, u32* out, std::size_t blocks) {
  constexpr int kCount = 1 << kLayers;
  const Lanes<V> c(p.mod);
  const Roots r = {p.inverse_roots.data(), p.inverse_roots_shoup.data()};
  const std::size_t t = p.n / blocks / kCount;
  for (std::size_t b = 0; b < blocks; ++b) {
    Factor<V> f[kCount];
    load_factors<V, kLayers>(f, r, blocks, b);
    if (kLast) {
      f[0] = {V::set(p.n_inverse), V::set(p.n_inverse_shoup)};
      f[1] = {V::set(p.last_root), V::set(p.last_root_shoup)};
    }
    const std::size_t start = b * t * kCount;
    for (std::size_t i = start; i < start + t; i += V::kWords) {
      Vec<V> x[kCount];
#pragma GCC unroll 8
      for (std::size_t k = 0; k < kCount; ++k) x[k] = V::load(out + i + k * t);
      backward_layers<V, kLayers, kLast>(x, f, c);
#pragma GCC unroll 8
      for (std::size_t k = 0; k < kCount; ++k) V::store(out + i + k * t, x[k]);
    }
  }
}

template <class V, int kLayers>
void backward_pass(const Prime<u32>& p, u32* out, std::size_t blocks) {
  if (blocks == 1)
    backward_loop<V, kLayers, true>(p, out, 1);
  else
    backward_loop<V, kLayers, false>(p, out, blocks);
}

template <class V>
void intt(const Prime<u32>& p, u32* out, const u32* in) {
  const Lanes<V> c(p.mod);
  const Roots r = {p.inverse_roots.data(), p.inverse_roots_shoup.data()};
  const std::size_t pairs = p.n / (2 * V::kWords);
  std::size_t b = 0;
  for (; b + kPairsAtOnce <= pairs; b += kPairsAtOnce) backward_pairs<V, kPairsAtOnce>(c, r, p.n, out, in, b);
  for (; b < pairs; ++b) backward_pairs<V, 1>(c, r, p.n, out, in, b);
  for (int left = p.log_n - V::kLogWords; left > 0;) {
    const int layers = next_layers<V>(left);
    left -= layers;
    const std::size_t blocks = std::size_t{1} << left;
    if (layers == 3)
      backward_pass<V, 3>(p, out, blocks);
    else if (layers == 2)
      backward_pass<V, 2>(p, out, blocks);
    else
      backward_pass<V, 1>(p, out, blocks);
  }
}

template <class V>
const Kernels<u32>& vector_kernels() {
  static constexpr Kernels<u32> table = {
      V::kName,   ntt<V>,       intt<V>,    reduce<V>,      lift_centred<V>, add<V>,       sub<V>,
      neg<V>,     mul<V>,       scale<V>,   scale_add<V>,   sub_scale<V>,    square<V>,    tensor<V>,
      dot_key<V>, dot_plain<V>, permute<V>, permute_add<V>, round_lift<V>,   pair_high<V>, pair_lift<V>,
  };
  return table;
}

}  // namespace
}  // namespace blindtail
