// Plain loops over one limb, for both word types: what every processor can run,
// and what the vector kernels are tested against.
#include "kernels.hpp"

namespace blindtail {
namespace {

/// A constant factor and its companion: x * value mod q, below 2q, for any word x (Shoup).
template <class W>
struct Factor {
  W value, companion;
  W times(W x, W q) const { return x * value - mul_high<W>(x, companion) * q; }
};

template <class W>
Factor<W> root(const Prime<W>& p, std::size_t i) {
  return {p.roots[i], p.roots_shoup[i]};
}

template <class W>
Factor<W> inverse_root(const Prime<W>& p, std::size_t i) {
  return {p.inverse_roots[i], p.inverse_roots_shoup[i]};
}

/// Harvey's lazy butterflies: values stay below 4q forward, below 2q backward.
template <class W>
void forward(W& x, W& y, Factor<W> f, W q) {
  const W a = reduce_once<W>(x, 2 * q), b = f.times(y, q);
  x = a + b;
  y = a + 2 * q - b;
}

template <class W>
void backward(W& x, W& y, Factor<W> f, W q) {
  const W a = x, b = y;
  x = reduce_once<W>(a + b, 2 * q);
  y = f.times(a + 2 * q - b, q);
}

/// From below 4q to canonical.
template <class W>
W canonical(W x, W q) {
  return reduce_once<W>(reduce_once<W>(x, 2 * q), q);
}

// Two layers a pass: the transforms load and store half as often.

template <class W, bool kLast>
void forward_pass(const Prime<W>& p, W* out, const W* in, std::size_t blocks) {
  const W q = p.mod.q;
  const std::size_t t = p.n / (4 * blocks);
  for (std::size_t b = 0; b < blocks; ++b) {
    const Factor<W> f1 = root(p, blocks + b), f2 = root(p, 2 * (blocks + b)),
                    f3 = root(p, 2 * (blocks + b) + 1);
    for (std::size_t i = 4 * b * t; i < (4 * b + 1) * t; ++i) {
      W x0 = in[i], x1 = in[i + t], x2 = in[i + 2 * t], x3 = in[i + 3 * t];
      forward(x0, x2, f1, q);
      forward(x1, x3, f1, q);
      forward(x0, x1, f2, q);
      forward(x2, x3, f3, q);
      out[i] = kLast ? canonical(x0, q) : x0;
      out[i + t] = kLast ? canonical(x1, q) : x1;
      out[i + 2 * t] = kLast ? canonical(x2, q) : x2;
      out[i + 3 * t] = kLast ? canonical(x3, q) : x3;
    }
  }
}

template <class W>
void ntt(const Prime<W>& p, W* out, const W* in) {
  std::size_t blocks = 1;
  if (p.log_n % 2 != 0) {
    const Factor<W> f = root(p, 1);
    for (std::size_t i = 0; i < p.n / 2; ++i) {
      W x = in[i], y = in[i + p.n / 2];
      forward(x, y, f, p.mod.q);
      out[i] = x;
      out[i + p.n / 2] = y;
    }
    in = out;
    blocks = 2;
  }
  for (; 4 * blocks < p.n; blocks *= 4) {
    forward_pass<W, false>(p, out, in, blocks);
    in = out;
  }
  forward_pass<W, true>(p, out, in, blocks);
}

/// `blocks` of the first of the two layers.
template <class W>
void backward_pass(const Prime<W>& p, W* out, const W* in, std::size_t blocks) {
  const W q = p.mod.q;
  const std::size_t t = p.n / (2 * blocks);
  const bool last = blocks == 2;
  for (std::size_t b = 0; b < blocks / 2; ++b) {
    const Factor<W> f1 = inverse_root(p, blocks + 2 * b), f2 = inverse_root(p, blocks + 2 * b + 1);
    // The last layer multiplies by N^-1 as well; the others leave sums as they are.
    const Factor<W> f3 = last ? Factor<W>{p.last_root, p.last_root_shoup} : inverse_root(p, blocks / 2 + b);
    const Factor<W> f0 = {p.n_inverse, p.n_inverse_shoup};
    for (std::size_t i = 4 * b * t; i < (4 * b + 1) * t; ++i) {
      W x0 = in[i], x1 = in[i + t], x2 = in[i + 2 * t], x3 = in[i + 3 * t];
      backward(x0, x1, f1, q);
      backward(x2, x3, f2, q);
      backward(x0, x2, f3, q);
      backward(x1, x3, f3, q);
      if (last) {
        x0 = reduce_once(f0.times(x0, q), q);
        x1 = reduce_once(f0.times(x1, q), q);
        x2 = reduce_once(x2, q);
        x3 = reduce_once(x3, q);
      }
      out[i] = x0;
      out[i + t] = x1;
      out[i + 2 * t] = x2;
      out[i + 3 * t] = x3;
    }
  }
}

template <class W>
void intt(const Prime<W>& p, W* out, const W* in) {
  std::size_t blocks = p.n / 2;
  if (p.log_n % 2 != 0) {
    for (std::size_t b = 0; b < blocks; ++b) {
      W x = in[2 * b], y = in[2 * b + 1];
      backward(x, y, inverse_root(p, blocks + b), p.mod.q);
      out[2 * b] = x;
      out[2 * b + 1] = y;
    }
    in = out;
    blocks /= 2;
  }
  for (; blocks >= 2; blocks /= 4) {
    backward_pass(p, out, in, blocks);
    in = out;
  }
}

template <class W>
void reduce(const Part<W>& p, W* out, const W* in) {
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) out[i] = mod.mul(in[i], mod.one);
}

/// x modulo `from`, centred, plus 2q where negative: below 2q.
template <class W>
W centred(W x, W from, W q) {
  return x > from / 2 ? x - from + 2 * q : x;
}

template <class W>
void lift_centred(const Part<W>& p, W* out, const W* in, W from) {
  const W q = p.mod.q;
  for (std::size_t i = 0; i < p.n; ++i) out[i] = centred(in[i], from, q);
}

template <class W>
void add(const Part<W>& p, W* out, const W* a, const W* b) {
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) out[i] = mod.add(a[i], b[i]);
}

template <class W>
void sub(const Part<W>& p, W* out, const W* a, const W* b) {
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) out[i] = mod.sub(a[i], b[i]);
}

template <class W>
void neg(const Part<W>& p, W* out, const W* a) {
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) out[i] = mod.neg(a[i]);
}

/// A sum of products of plain residues, below 4 q^2, to its plain residue.
template <class W>
W plain(const Modulus<W>& mod, Wide<W> sum) {
  return mod.mul(mod.redc(sum), mod.square);
}

template <class W>
void mul(const Part<W>& p, W* out, const W* a, const W* b) {
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) out[i] = plain(mod, static_cast<Wide<W>>(a[i]) * b[i]);
}

template <class W>
void scale(const Part<W>& p, W* out, const W* a, W mont) {
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) out[i] = mod.mul(a[i], mont);
}

template <class W>
void scale_add(const Part<W>& p, W* out, const W* a, W mont) {
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) out[i] = mod.add(out[i], mod.mul(a[i], mont));
}

template <class W>
void sub_scale(const Part<W>& p, W* out, const W* a, const W* t, W mont) {
  const Modulus<W> mod = p.mod;
  const W two_q = 2 * mod.q;
  for (std::size_t i = 0; i < p.n; ++i) out[i] = mod.mul(a[i] + two_q - reduce_once<W>(t[i], two_q), mont);
}

template <class W>
void square(const Part<W>& p, W* d0, W* d1, W* d2, const W* a0, const W* a1) {
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) {
    const Wide<W> x = a0[i], y = a1[i];
    d0[i] = plain(mod, x * x);
    d1[i] = plain(mod, 2 * x * y);
    d2[i] = plain(mod, y * y);
  }
}

template <class W>
void tensor(const Part<W>& p, W* d0, W* d1, W* d2, const W* a0, const W* a1, const W* b0, const W* b1) {
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) {
    const Wide<W> x0 = a0[i], x1 = a1[i], y0 = b0[i], y1 = b1[i];
    d0[i] = plain(mod, x0 * y0);
    d1[i] = plain(mod, x0 * y1 + x1 * y0);
    d2[i] = plain(mod, x1 * y1);
  }
}

/// out (+)= sum a[i] b[i] * 2^-bits. At most 12 products below q^2, q < 2^(bits-2): the sum's high
/// word is below 3q, so one reduction step leaves less than 4q.
template <class W>
void dot(const Part<W>& p, W* out, const W* const* a, const W* const* b, std::size_t count, bool accumulate) {
  const Modulus<W> mod = p.mod;
  constexpr std::size_t kBlock = kBits<W> == 32 ? 32 : 8;  // sums that stay near the processor
  for (std::size_t at = 0; at < p.n; at += kBlock) {
    Wide<W> sums[kBlock] = {};
    for (std::size_t j = 0; j < count; ++j) {
      const W* x = a[j] + at;
      const W* y = b[j] + at;
      for (std::size_t i = 0; i < kBlock; ++i) sums[i] += static_cast<Wide<W>>(x[i]) * y[i];
    }
    for (std::size_t i = 0; i < kBlock; ++i) {
      const W m = static_cast<W>(sums[i]) * mod.inverse;
      const W lazy = static_cast<W>(sums[i] >> kBits<W>) + mod.q - mul_high<W>(m, mod.q);
      const W sum = canonical(lazy, mod.q);
      out[at + i] = accumulate ? mod.add(out[at + i], sum) : sum;
    }
  }
}

template <class W>
void dot_key(const Part<W>& p, W* out0, W* out1, const W* const* a, const W* const* b0, const W* const* b1,
             std::size_t count, bool accumulate) {
  dot(p, out0, a, b0, count, accumulate);
  dot(p, out1, a, b1, count, accumulate);
}

template <class W>
void dot_plain(const Part<W>& p, W* out0, W* out1, const W* const* a0, const W* const* a1, const W* const* b,
               std::size_t count, bool accumulate) {
  dot(p, out0, a0, b, count, accumulate);
  dot(p, out1, a1, b, count, accumulate);
}

template <class W>
void permute(const Automorphism& g, std::size_t first, std::size_t n, W* out, const W* in) {
  const u32* index = g.index.data() + first;
  const std::size_t source = g.source(first, n);
  for (std::size_t i = 0; i < n; ++i) out[i] = in[index[i] - source];
}

template <class W>
void permute_add(const Part<W>& p, const Automorphism& g, std::size_t first, W* out, const W* in) {
  const Modulus<W> mod = p.mod;
  const u32* index = g.index.data() + first;
  const std::size_t source = g.source(first, p.n);
  for (std::size_t i = 0; i < p.n; ++i) out[i] = mod.add(out[i], in[index[i] - source]);
}

/// Residues of another prime to below 2q: with 32 bits they are below 4q, with 64 anything.
template <class W>
W below_2q(const Modulus<W>& mod, W x) {
  return kBits<W> == 32 ? reduce_once<W>(x, 2 * mod.q) : mod.mul(x, mod.one);
}

template <class W>
void round_lift(const Part<W>& p, W* out, const W* y, W last) {
  const Modulus<W> mod = p.mod;
  const W half = last / 2, add_back = mod.q - half % mod.q;
  for (std::size_t i = 0; i < p.n; ++i) {
    const W rounded = reduce_once<W>(y[i] + half, last);
    out[i] = below_2q(mod, rounded) + add_back;
  }
}

template <class W>
void pair_high(const Part<W>& special, W* h, const W* y_special, const W* y_last, W mont) {
  sub_scale(special, h, y_special, y_last, mont);
}

template <class W>
void pair_lift(const Part<W>& p, W* out, const W* y_last, const W* h, W special, W last, W mont) {
  (void)last;
  const Modulus<W> mod = p.mod;
  for (std::size_t i = 0; i < p.n; ++i) {
    const bool negative = h[i] > special / 2;
    const W size = mod.mul(negative ? special - h[i] : h[i], mont);
    out[i] = below_2q(mod, y_last[i]) + (negative ? mod.neg(size) : size);
  }
}

}  // namespace

template <class W>
const Kernels<W>& portable_kernels() {
  static const Kernels<W> table = {
      "portable", ntt<W>,       intt<W>,    reduce<W>,      lift_centred<W>, add<W>,       sub<W>,
      neg<W>,     mul<W>,       scale<W>,   scale_add<W>,   sub_scale<W>,    square<W>,    tensor<W>,
      dot_key<W>, dot_plain<W>, permute<W>, permute_add<W>, round_lift<W>,   pair_high<W>, pair_lift<W>,
  };
  return table;
}

template const Kernels<u32>& portable_kernels<u32>();
template const Kernels<u64>& portable_kernels<u64>();

}  // namespace blindtail
