// The inner loops, one table of them for each instruction set; all give the same words.
//
// Every array is one limb: n words modulo one prime, 64-byte aligned; n a multiple of 32. Loops that go word
// by word take a `Part`, which a whole prime becomes by itself: a limb or a block of one.
// "Canonical" means below q. Pointers may be equal where a comment says "in place";
// otherwise outputs overlap no input. `mont` arguments are in Montgomery form.
#pragma once

#include <cstddef>

#include "ring.hpp"

namespace blindtail {

/// The most terms one call of `dot*` takes: sums stay below 2^bits * 4q (see kernels_vector.hpp).
inline constexpr std::size_t kMaxTerms = 12;

template <class W>
struct Kernels {
  const char* name;

  /// Forward transform, natural to bit-reversed order. Input below 4q, output canonical. In place allowed.
  void (*ntt)(const Prime<W>& p, W* out, const W* in);
  /// Inverse transform, N^-1 included. Input and output canonical. In place allowed.
  void (*intt)(const Prime<W>& p, W* out, const W* in);

  /// out = in mod q for any words. In place allowed.
  void (*reduce)(const Part<W>& p, W* out, const W* in);
  /// Residues x of another prime `from`, taken as integers in (-from/2, from/2], into words below 4q.
  /// `from` < 2q. (Centred: a digit then has mean zero.)
  void (*lift_centred)(const Part<W>& p, W* out, const W* in, W from);

  /// out = a + b, a - b, -a. Canonical. In place allowed.
  void (*add)(const Part<W>& p, W* out, const W* a, const W* b);
  void (*sub)(const Part<W>& p, W* out, const W* a, const W* b);
  void (*neg)(const Part<W>& p, W* out, const W* a);
  /// out = a * b, plain operands, plain result, canonical. In place allowed.
  void (*mul)(const Part<W>& p, W* out, const W* a, const W* b);
  /// out = a * mont, a scalar. a below 4q, result canonical. In place allowed.
  void (*scale)(const Part<W>& p, W* out, const W* a, W mont);
  /// out += a * mont. Canonical.
  void (*scale_add)(const Part<W>& p, W* out, const W* a, W mont);
  /// out = (a - t) * mont; a canonical, t below 4q, result canonical. In place allowed.
  void (*sub_scale)(const Part<W>& p, W* out, const W* a, const W* t, W mont);
  /// (a0 + a1 Y)^2 = d0 + d1 Y + d2 Y^2. Canonical.
  void (*square)(const Part<W>& p, W* d0, W* d1, W* d2, const W* a0, const W* a1);
  /// (a0 + a1 Y)(b0 + b1 Y) = d0 + d1 Y + d2 Y^2. Canonical.
  void (*tensor)(const Part<W>& p, W* d0, W* d1, W* d2, const W* a0, const W* a1, const W* b0, const W* b1);

  /// out0 (+)= sum a[i] b0[i], out1 (+)= sum a[i] b1[i]; i < count <= kMaxTerms; a canonical, b mont and
  /// canonical; results canonical; adds to what is there if `accumulate`. Key switching: digits a, a key b.
  void (*dot_key)(const Part<W>& p, W* out0, W* out1, const W* const* a, const W* const* b0,
                  const W* const* b1, std::size_t count, bool accumulate);
  /// out0 (+)= sum a0[i] b[i], out1 (+)= sum a1[i] b[i]. Ciphertexts a times plaintexts b (mont).
  void (*dot_plain)(const Part<W>& p, W* out0, W* out1, const W* const* a0, const W* const* a1,
                    const W* const* b, std::size_t count, bool accumulate);

  /// out[i] = in[index[first + i] - g.source(first, n)], i < n: a block from the block that it comes from; n
  /// a power of two >= 32 that divides `first`. A whole limb: n = N, first = 0.
  void (*permute)(const Automorphism& g, std::size_t first, std::size_t n, W* out, const W* in);
  /// out[i] += the same, n = p.n, canonical.
  void (*permute_add)(const Part<W>& p, const Automorphism& g, std::size_t first, W* out, const W* in);

  /// Dividing by the prime `last`, rounding as SEAL does (divide_and_round_q_last): from last's residues y
  /// in coefficient form, t = ((y + last/2) mod last) - (last/2 mod q) as words below 4q, mod p.
  /// Then x/last = (x - NTT(t)) * last^-1. With last < 4q where W is 32 bits; any with 64.
  void (*round_lift)(const Part<W>& p, W* out, const W* y, W last);
  /// Dividing by two primes at once, first step, modulo `special`: h = (y_special - y_last) * mont
  /// with mont = last^-1 (Montgomery form modulo special): y = y_last + last * h is the residue modulo
  /// their product. y_last canonical modulo last < 4 special.
  void (*pair_high)(const Part<W>& special, W* h, const W* y_special, const W* y_last, W mont);
  /// Second step, modulo p: y_last + last * (h centred modulo `special`) as words below 4q;
  /// mont = last mod p in Montgomery form; special < 4q and last < 4q where W is 32 bits.
  void (*pair_lift)(const Part<W>& p, W* out, const W* y_last, const W* h, W special, W last, W mont);
};

/// Plain loops: the definition that the others are tested against.
template <class W>
const Kernels<W>& portable_kernels();

/// The best of what this processor has, or the one named: "avx512", "avx2", "portable".
/// Throws std::invalid_argument when the processor lacks it. 64-bit words know "portable" alone.
template <class W>
const Kernels<W>& kernels(const char* name = nullptr);
template <>
const Kernels<u32>& kernels<u32>(const char* name);
template <>
const Kernels<u64>& kernels<u64>(const char* name);

}  // namespace blindtail
