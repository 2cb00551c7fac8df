// SEAL's operations one by one, residue for residue, on the engine's kernels.
//
// What the engine rearranges for speed is built from the same inner loops; these give
// exactly SEAL's words and so prove the loops, on every instruction set.
#pragma once

#include <span>
#include <vector>

#include "engine.hpp"

namespace blindtail {

/// Polynomials of one level in NTT form: limb(poly, prime). Rows are q_0 ... q_level.
template <class W>
struct Polynomials {
  std::size_t count = 0, rows = 0, n = 0;
  Buffer<W> words;

  Polynomials(std::size_t count, std::size_t rows, std::size_t n)
      : count(count), rows(rows), n(n), words(count * rows * n) {}
  W* limb(std::size_t poly, std::size_t row) { return words.data() + (poly * rows + row) * n; }
  const W* limb(std::size_t poly, std::size_t row) const { return words.data() + (poly * rows + row) * n; }
};

/// One evaluation key as SEAL holds it: digit by digit, two polynomials over all key primes, plain residues.
template <class W>
using SealKey = std::vector<Polynomials<W>>;

template <class W>
Polynomials<W> exact_add(const Chain<W>& chain, const Polynomials<W>& a, const Polynomials<W>& b);
template <class W>
Polynomials<W> exact_multiply_plain(const Chain<W>& chain, const Polynomials<W>& a,
                                    const Polynomials<W>& plain);
/// Two polynomials each -> three.
template <class W>
Polynomials<W> exact_multiply(const Chain<W>& chain, const Polynomials<W>& a, const Polynomials<W>& b);
/// Three polynomials -> two.
template <class W>
Polynomials<W> exact_relinearise(const Chain<W>& chain, const Polynomials<W>& a, const SealKey<W>& key);
template <class W>
Polynomials<W> exact_rotate(const Chain<W>& chain, const Polynomials<W>& a, u32 element,
                            const SealKey<W>& key);
/// Divide by the last prime and drop it.
template <class W>
Polynomials<W> exact_rescale(const Chain<W>& chain, const Polynomials<W>& a);
/// Drop the last prime.
template <class W>
Polynomials<W> exact_mod_switch(const Polynomials<W>& a);

}  // namespace blindtail
