// Arithmetic modulo a prime on one word, and the constants that vector code needs.
//
// Two word types: uint32_t for primes below 2^30, uint64_t for primes below 2^60.
// Values below 4q then fit a word, which is what the lazy transforms use.
// Montgomery form of a: a * R mod q with R = 2^bits (Montgomery, Math. Comp. 44, 1985).
#pragma once

#include <cstdint>
#include <type_traits>

namespace blindtail {

using u32 = std::uint32_t;
using u64 = std::uint64_t;
using u128 = unsigned __int128;

template <class W>
using Wide = std::conditional_t<std::is_same_v<W, u32>, u64, u128>;

template <class W>
inline constexpr int kBits = 8 * sizeof(W);

/// The high word of a * b.
template <class W>
inline W mul_high(W a, W b) {
  return static_cast<W>((static_cast<Wide<W>>(a) * b) >> kBits<W>);
}

/// x - bound where x >= bound: x < 2 * bound becomes x < bound.
template <class W>
inline W reduce_once(W x, W bound) {
  return x >= bound ? x - bound : x;
}

/// A prime and the constants of its arithmetic.
template <class W>
struct Modulus {
  W q = 0;
  W inverse = 0;  // q^-1 mod 2^bits
  W one = 0;      // 2^bits mod q: 1 in Montgomery form
  W square = 0;   // 2^(2 bits) mod q: multiplying by it enters Montgomery form

  Modulus() = default;
  explicit Modulus(W prime) : q(prime) {
    W x = prime;  // correct to 3 bits; each step doubles them
    for (int i = 0; i < 6; ++i) x *= 2 - prime * x;
    inverse = x;
    one = static_cast<W>((static_cast<Wide<W>>(1) << kBits<W>) % prime);
    square = static_cast<W>(static_cast<Wide<W>>(one) * one % prime);
  }

  /// x * 2^-bits mod q, canonical, for x < q * 2^bits.
  W redc(Wide<W> x) const {
    const W low = static_cast<W>(x) * inverse;
    const W high = static_cast<W>(x >> kBits<W>);
    const W sub = mul_high<W>(low, q);
    return high >= sub ? high - sub : high - sub + q;
  }

  /// a * b * 2^-bits mod q, canonical. One operand in Montgomery form gives the plain product.
  W mul(W a, W b) const { return redc(static_cast<Wide<W>>(a) * b); }
  W to_montgomery(W a) const { return mul(a, square); }
  W from_montgomery(W a) const { return redc(a); }
  W add(W a, W b) const { return reduce_once<W>(a + b, q); }
  W sub(W a, W b) const { return a >= b ? a - b : a - b + q; }
  W neg(W a) const { return a == 0 ? 0 : q - a; }
  /// a^e of plain residues, plain.
  W power(W a, u64 e) const {
    W base = to_montgomery(a % q), result = one;
    for (; e != 0; e >>= 1) {
      if (e & 1) result = mul(result, base);
      base = mul(base, base);
    }
    return from_montgomery(result);
  }
  W inverse_of(W a) const { return power(a, q - 2); }
};

/// floor(w * 2^bits / q): Shoup's companion of a constant factor w < q.
template <class W>
inline W shoup(W w, W q) {
  return static_cast<W>((static_cast<Wide<W>>(w) << kBits<W>) / q);
}

}  // namespace blindtail
