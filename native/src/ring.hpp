// One prime of a ring Z_q[X]/(X^N + 1): roots of unity in the order SEAL uses.
//
// The transform is the negacyclic one of Longa and Naehrig (CANS 2016): forward
// Cooley-Tukey, natural to bit-reversed order, inverse Gentleman-Sande. The root
// is the smallest primitive 2N-th root of unity, as SEAL chooses it, so residues
// in NTT form mean the same in both.
#pragma once

#include <cstddef>
#include <vector>

#include "memory.hpp"
#include "modular.hpp"

namespace blindtail {

template <class W>
struct Prime {
  Modulus<W> mod;
  int log_n = 0;
  std::size_t n = 0;
  // roots[i] = psi^bitrev(i, log_n), i = 0 ... n-1, plain; layer of m blocks uses roots[m + block].
  // inverse_roots[i] is the inverse of roots[i]. *_shoup are the companions of the same index.
  Buffer<W> roots, roots_shoup, inverse_roots, inverse_roots_shoup;
  W n_inverse = 0, n_inverse_shoup = 0;  // N^-1 mod q
  W last_root = 0, last_root_shoup = 0;  // N^-1 * inverse_roots[1]: the inverse's last layer

  /// Throws std::invalid_argument unless q is a prime = 1 mod 2N of the word's range.
  Prime(W q, int log_n);
};

/// A run of words modulo one prime: a whole limb, or a block of one, as loops word by word take them.
template <class W>
struct Part {
  const Modulus<W>& mod;
  std::size_t n;

  Part(const Prime<W>& prime) : Part(prime, prime.n) {}  // not explicit: a limb is a part of itself
  Part(const Prime<W>& prime, std::size_t words) : mod(prime.mod), n(words) {}
};

/// X -> X^g on polynomials in NTT form: out[i] = in[index[i]].
///
/// Position i holds the value at psi^(2 bitrev(i) + 1), so the high bits of i are the exponent's low bits,
/// and those of the source follow from them alone: an aligned block of any power of two comes from one such
/// block.
///
/// A group of 16 neighbours comes from one group of 16 neighbours (bit-reversed order):
/// group[b] is the source group of output group b, lanes[b] the row of `orders` that says
/// which of its 16 words goes where: out[16 b + i] = in[16 group[b] + orders[16 lanes[b] + i]].
struct Automorphism {
  u32 element = 1;
  std::vector<u32> index;
  std::vector<u32> group;
  std::vector<u32> lanes;
  std::vector<u32> orders;

  Automorphism(u32 element, int log_n);
  /// Where the block comes from that goes to [first, first + n): n a power of two >= 16 that divides `first`.
  std::size_t source(std::size_t first, std::size_t n) const { return index[first] / n * n; }
};

u32 reverse_bits(u32 value, int bits);

extern template struct Prime<u32>;
extern template struct Prime<u64>;

}  // namespace blindtail
