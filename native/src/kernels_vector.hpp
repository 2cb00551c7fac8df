// Pointwise kernels on 32-bit lanes, for any vector type V of kernels_avx512.cpp or kernels_avx2.cpp.
//
// Everything here is in an unnamed namespace: each file that includes it is compiled for
// another processor, and the linker must not take one file's copy for another's. For the same
// reason no function of the standard library or of modular.hpp is called.
#pragma once

#include "kernels.hpp"

namespace blindtail {
namespace {

#define BLINDTAIL_INLINE [[gnu::always_inline]] inline

template <class V>
using Vec = typename V::Vec;

/// The prime in all lanes.
template <class V>
struct Lanes {
  Vec<V> q, two_q, inverse;
  BLINDTAIL_INLINE explicit Lanes(const Modulus<u32>& mod)
      : q(V::set(mod.q)), two_q(V::set(2 * mod.q)), inverse(V::set(mod.inverse)) {}
};

/// A constant factor and Shoup's companion, the same in all lanes.
template <class V>
struct Factor {
  Vec<V> value, companion;
};

template <class V>
BLINDTAIL_INLINE Factor<V> factor(u32 plain, u32 q) {
  return {V::set(plain), V::set(static_cast<u32>((static_cast<u64>(plain) << 32) / q))};
}

template <class V>
BLINDTAIL_INLINE Factor<V> factor_of_mont(u32 mont, const Part<u32>& p) {
  const u32 sub = static_cast<u32>((static_cast<u64>(mont * p.mod.inverse) * p.mod.q) >> 32);
  return factor<V>(sub == 0 ? 0 : p.mod.q - sub, p.mod.q);
}

/// x - bound where that does not wrap: unsigned, a wrapped difference is the larger one.
template <class V>
BLINDTAIL_INLINE Vec<V> reduce_once(Vec<V> x, Vec<V> bound) {
  return V::min(x, V::sub(x, bound));
}

/// a - b modulo q for canonical a and b, by the same trick.
template <class V>
BLINDTAIL_INLINE Vec<V> sub_mod(Vec<V> a, Vec<V> b, Vec<V> q) {
  const Vec<V> d = V::sub(a, b);
  return V::min(d, V::add(d, q));
}

template <class V>
BLINDTAIL_INLINE Vec<V> add_mod(Vec<V> a, Vec<V> b, Vec<V> q) {
  return reduce_once<V>(V::add(a, b), q);
}

/// High words of x * c; `even` and `odd` hold the factors of even and odd lanes in even lanes.
template <class V>
BLINDTAIL_INLINE Vec<V> high_product(Vec<V> x, Vec<V> even, Vec<V> odd) {
  return V::join_high(V::mul_even(x, even), V::mul_even(V::odd(x), odd));
}

/// x * f mod q, below 2q, for any words x.
template <class V>
BLINDTAIL_INLINE Vec<V> times(Vec<V> x, const Factor<V>& f, Vec<V> q) {
  const Vec<V> quotient = high_product<V>(x, f.companion, f.companion);
  return V::keep(V::sub(V::mul_low(x, f.value), V::mul_low(quotient, q)));
}

/// 64-bit sums of products: those of even lanes and those of odd lanes.
template <class V>
struct Sums {
  Vec<V> even, odd;
};

template <class V>
BLINDTAIL_INLINE Sums<V> product(Vec<V> a, Vec<V> b) {
  return {V::mul_even(a, b), V::mul_even(V::odd(a), V::odd(b))};
}

template <class V>
BLINDTAIL_INLINE Sums<V> add_sums(Sums<V> a, Sums<V> b) {
  return {V::add64(a.even, b.even), V::add64(a.odd, b.odd)};
}

/// sum * 2^-32 mod q: below q + high word of the largest sum (Montgomery).
template <class V>
BLINDTAIL_INLINE Vec<V> redc(Sums<V> s, const Lanes<V>& c) {
  const Vec<V> even = V::mul_even(V::mul_even(s.even, c.inverse), c.q);
  const Vec<V> odd = V::mul_even(V::mul_even(s.odd, c.inverse), c.q);
  // The low words are equal, so nothing is borrowed from the high ones.
  return V::add(V::join_high(V::sub64(s.even, even), V::sub64(s.odd, odd)), c.q);
}

/// A sum of at most three products of plain residues to its plain residue; `one` is 2^32 mod q.
template <class V>
BLINDTAIL_INLINE Vec<V> plain(Sums<V> s, const Factor<V>& one, const Lanes<V>& c) {
  return reduce_once<V>(times<V>(redc<V>(s, c), one, c.q), c.q);
}

template <class V>
void reduce(const Part<u32>& p, u32* out, const u32* in) {
  const Vec<V> q = V::set(p.mod.q);
  const Factor<V> one = factor<V>(1, p.mod.q);
  for (std::size_t i = 0; i < p.n; i += V::kWords)
    V::store(out + i, reduce_once<V>(times<V>(V::load(in + i), one, q), q));
}

template <class V>
void lift_centred(const Part<u32>& p, u32* out, const u32* in, u32 from) {
  const Vec<V> half = V::set(from / 2), shift = V::set(2 * p.mod.q - from);
  for (std::size_t i = 0; i < p.n; i += V::kWords) {
    const Vec<V> x = V::load(in + i);
    V::store(out + i, V::add_where_above(x, half, shift));
  }
}

template <class V>
void add(const Part<u32>& p, u32* out, const u32* a, const u32* b) {
  const Vec<V> q = V::set(p.mod.q);
  for (std::size_t i = 0; i < p.n; i += V::kWords)
    V::store(out + i, add_mod<V>(V::load(a + i), V::load(b + i), q));
}

template <class V>
void sub(const Part<u32>& p, u32* out, const u32* a, const u32* b) {
  const Vec<V> q = V::set(p.mod.q);
  for (std::size_t i = 0; i < p.n; i += V::kWords)
    V::store(out + i, sub_mod<V>(V::load(a + i), V::load(b + i), q));
}

template <class V>
void neg(const Part<u32>& p, u32* out, const u32* a) {
  const Vec<V> q = V::set(p.mod.q), zero = V::set(0);
  for (std::size_t i = 0; i < p.n; i += V::kWords) V::store(out + i, sub_mod<V>(zero, V::load(a + i), q));
}

template <class V>
void mul(const Part<u32>& p, u32* out, const u32* a, const u32* b) {
  const Lanes<V> c(p.mod);
  const Factor<V> one = factor<V>(p.mod.one, p.mod.q);
  for (std::size_t i = 0; i < p.n; i += V::kWords)
    V::store(out + i, plain<V>(product<V>(V::load(a + i), V::load(b + i)), one, c));
}

template <class V>
void scale(const Part<u32>& p, u32* out, const u32* a, u32 mont) {
  const Vec<V> q = V::set(p.mod.q);
  const Factor<V> f = factor_of_mont<V>(mont, p);
  for (std::size_t i = 0; i < p.n; i += V::kWords)
    V::store(out + i, reduce_once<V>(times<V>(V::load(a + i), f, q), q));
}

template <class V>
void scale_add(const Part<u32>& p, u32* out, const u32* a, u32 mont) {
  const Vec<V> q = V::set(p.mod.q);
  const Factor<V> f = factor_of_mont<V>(mont, p);
  for (std::size_t i = 0; i < p.n; i += V::kWords) {
    const Vec<V> product = reduce_once<V>(times<V>(V::load(a + i), f, q), q);
    V::store(out + i, add_mod<V>(V::load(out + i), product, q));
  }
}

template <class V>
void sub_scale(const Part<u32>& p, u32* out, const u32* a, const u32* t, u32 mont) {
  const Vec<V> q = V::set(p.mod.q), two_q = V::set(2 * p.mod.q);
  const Factor<V> f = factor_of_mont<V>(mont, p);
  for (std::size_t i = 0; i < p.n; i += V::kWords) {
    const Vec<V> b = reduce_once<V>(V::load(t + i), two_q);
    const Vec<V> difference = V::sub(V::add(V::load(a + i), two_q), b);
    V::store(out + i, reduce_once<V>(times<V>(difference, f, q), q));
  }
}

template <class V>
void square(const Part<u32>& p, u32* d0, u32* d1, u32* d2, const u32* a0, const u32* a1) {
  const Lanes<V> c(p.mod);
  const Factor<V> one = factor<V>(p.mod.one, p.mod.q);
  for (std::size_t i = 0; i < p.n; i += V::kWords) {
    const Vec<V> x = V::load(a0 + i), y = V::load(a1 + i);
    V::store(d0 + i, plain<V>(product<V>(x, x), one, c));
    V::store(d1 + i, plain<V>(product<V>(V::add(x, x), y), one, c));
    V::store(d2 + i, plain<V>(product<V>(y, y), one, c));
  }
}

template <class V>
void tensor(const Part<u32>& p, u32* d0, u32* d1, u32* d2, const u32* a0, const u32* a1, const u32* b0,
            const u32* b1) {
  const Lanes<V> c(p.mod);
  const Factor<V> one = factor<V>(p.mod.one, p.mod.q);
  for (std::size_t i = 0; i < p.n; i += V::kWords) {
    const Vec<V> x0 = V::load(a0 + i), x1 = V::load(a1 + i), y0 = V::load(b0 + i), y1 = V::load(b1 + i);
    const Sums<V> middle = add_sums<V>(product<V>(x0, y1), product<V>(x1, y0));
    V::store(d0 + i, plain<V>(product<V>(x0, y0), one, c));
    V::store(d1 + i, plain<V>(middle, one, c));
    V::store(d2 + i, plain<V>(product<V>(x1, y1), one, c));
  }
}

/// Words ahead of which keys and plaintexts are asked for: a page, where the hardware stops by itself.
/// Words ahead of which streamed rows are asked for. The hardware does not keep up with many rows at once,
/// and what is asked for must fit the first-level cache: up to 24 rows of this.
constexpr std::size_t kAhead = 256;

/// out0 (+)= sum shared[i] b0[i], out1 (+)= sum shared[i] b1[i]; of keys b is streamed, of plaintexts
/// `shared`. kVectors at a time: all sums stay in registers, and loads of pointers are shared.
/// At most 12 products below q^2 with q < 2^30: the high word is below 3q, and redc's result below 4q.
template <class V, bool kKey, bool kAccumulate, int kVectors>
BLINDTAIL_INLINE void dot_loop(const Part<u32>& p, u32* out0, u32* out1, const u32* const* shared,
                               const u32* const* b0, const u32* const* b1, std::size_t count) {
  constexpr std::size_t kStep = kVectors * V::kWords;
  const Lanes<V> c(p.mod);
  for (std::size_t i = 0; i < p.n; i += kStep) {
    Sums<V> s0[kVectors], s1[kVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) s0[k] = s1[k] = {V::set(0), V::set(0)};
    for (std::size_t j = 0; j < count; ++j) {
      const u32 *x = shared[j] + i, *y0 = b0[j] + i, *y1 = b1[j] + i;
#pragma GCC unroll 4
      for (std::size_t k = 0; k < kStep; k += 16) {
        V::prefetch((kKey ? y0 : x) + k + kAhead);
        if (kKey) V::prefetch(y1 + k + kAhead);
      }
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const Vec<V> a = V::load(x + k * V::kWords), a_odd = V::odd(a);
        const Vec<V> v0 = V::load(y0 + k * V::kWords), v1 = V::load(y1 + k * V::kWords);
        s0[k] = add_sums<V>(s0[k], {V::mul_even(a, v0), V::mul_even(a_odd, V::odd(v0))});
        s1[k] = add_sums<V>(s1[k], {V::mul_even(a, v1), V::mul_even(a_odd, V::odd(v1))});
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const std::size_t at = i + k * V::kWords;
      Vec<V> r0 = reduce_once<V>(reduce_once<V>(redc<V>(s0[k], c), c.two_q), c.q);
      Vec<V> r1 = reduce_once<V>(reduce_once<V>(redc<V>(s1[k], c), c.two_q), c.q);
      if (kAccumulate) {
        r0 = add_mod<V>(r0, V::load(out0 + at), c.q);
        r1 = add_mod<V>(r1, V::load(out1 + at), c.q);
      }
      V::store(out0 + at, r0);
      V::store(out1 + at, r1);
    }
  }
}

template <class V, bool kKey>
BLINDTAIL_INLINE void dot(const Part<u32>& p, u32* out0, u32* out1, const u32* const* shared,
                          const u32* const* b0, const u32* const* b1, std::size_t count, bool accumulate) {
  if (p.n % (V::kDotVectors * V::kWords) != 0)  // n = 32
    accumulate ? dot_loop<V, kKey, true, 1>(p, out0, out1, shared, b0, b1, count)
               : dot_loop<V, kKey, false, 1>(p, out0, out1, shared, b0, b1, count);
  else
    accumulate ? dot_loop<V, kKey, true, V::kDotVectors>(p, out0, out1, shared, b0, b1, count)
               : dot_loop<V, kKey, false, V::kDotVectors>(p, out0, out1, shared, b0, b1, count);
}

template <class V>
void dot_key(const Part<u32>& p, u32* out0, u32* out1, const u32* const* a, const u32* const* b0,
             const u32* const* b1, std::size_t count, bool accumulate) {
  dot<V, true>(p, out0, out1, a, b0, b1, count, accumulate);
}

template <class V>
void dot_plain(const Part<u32>& p, u32* out0, u32* out1, const u32* const* a0, const u32* const* a1,
               const u32* const* b, std::size_t count, bool accumulate) {
  dot<V, false>(p, out0, out1, b, a0, a1, count, accumulate);
}

/// Groups of 16 come from groups of 16, and any aligned half of one from a half of one.
template <class V, class Put>
BLINDTAIL_INLINE void permute_loop(const Automorphism& g, std::size_t first, std::size_t n, const u32* in,
                                   Put put) {
  const std::size_t begin = first / 16, groups = n / 16;
  const u32 *group = g.group.data() + begin, *lanes = g.lanes.data() + begin, *orders = g.orders.data();
  const std::size_t source = group[0] / groups * groups;
  for (std::size_t b = 0; b < groups; ++b) {
    const u32 *from = in + 16 * (group[b] - source), *order = orders + 16 * std::size_t{lanes[b]};
#pragma GCC unroll 2
    for (std::size_t k = 0; k < 16; k += V::kWords) {
      const u32* part = from + (V::kWords == 16 ? 0 : order[k] & 8);
      put(16 * b + k, V::select(V::load(part), V::load_unaligned(order + k)));
    }
  }
}

template <class V>
void permute(const Automorphism& g, std::size_t first, std::size_t n, u32* out, const u32* in) {
  permute_loop<V>(g, first, n, in, [=](std::size_t at, Vec<V> x) { V::store(out + at, x); });
}

template <class V>
void permute_add(const Part<u32>& p, const Automorphism& g, std::size_t first, u32* out, const u32* in) {
  const Vec<V> q = V::set(p.mod.q);
  permute_loop<V>(g, first, p.n, in,
                  [=](std::size_t at, Vec<V> x) { V::store(out + at, add_mod<V>(V::load(out + at), x, q)); });
}

template <class V>
void round_lift(const Part<u32>& p, u32* out, const u32* y, u32 last) {
  const u32 half = last / 2;
  const Vec<V> add_half = V::set(half), modulus = V::set(last), two_q = V::set(2 * p.mod.q);
  const Vec<V> add_back = V::set(p.mod.q - half % p.mod.q);
  for (std::size_t i = 0; i < p.n; i += V::kWords) {
    const Vec<V> rounded = reduce_once<V>(V::add(V::load(y + i), add_half), modulus);
    V::store(out + i, V::add(reduce_once<V>(rounded, two_q), add_back));
  }
}

template <class V>
void pair_high(const Part<u32>& special, u32* h, const u32* y_special, const u32* y_last, u32 mont) {
  sub_scale<V>(special, h, y_special, y_last, mont);
}

template <class V>
void pair_lift(const Part<u32>& p, u32* out, const u32* y_last, const u32* h, u32 special, u32, u32 mont) {
  const Vec<V> q = V::set(p.mod.q), two_q = V::set(2 * p.mod.q);
  const Vec<V> half = V::set(special / 2), shift = V::set(2 * p.mod.q - special);
  const Factor<V> f = factor_of_mont<V>(mont, p);
  for (std::size_t i = 0; i < p.n; i += V::kWords) {
    const Vec<V> x = V::load(h + i);
    const Vec<V> centred = V::add_where_above(x, half, shift);  // below 2q, as special < 4q
    const Vec<V> product = reduce_once<V>(times<V>(centred, f, q), q);
    V::store(out + i, V::add(reduce_once<V>(V::load(y_last + i), two_q), product));
  }
}

}  // namespace
}  // namespace blindtail
