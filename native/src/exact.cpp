#include "exact.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace blindtail {

namespace {

template <class W>
void same_shape(const Polynomials<W>& a, const Polynomials<W>& b) {
  if (a.rows != b.rows || a.n != b.n) throw std::invalid_argument("operands of different levels");
}

/// What a key makes of `target` (NTT form, rows of one level): two polynomials modulo Q, SEAL's way:
/// digits in [0, q), not centred; dividing by the special prime at the end.
template <class W>
Polynomials<W> switched(const Chain<W>& chain, const W* target, std::size_t rows, const SealKey<W>& key) {
  const std::size_t n = chain.n, s = chain.special();
  if (key.size() < rows) throw std::invalid_argument("a key of too low a level");
  for (const auto& digit : key)
    if (digit.count != 2 || digit.rows != s + 1 || digit.n != n) throw std::invalid_argument("a key's shape");
  Polynomials<W> sums(2, rows + 1, n), out(2, rows, n);
  Buffer<W> digits(rows * n), lifted(n), b0(n), b1(n);
  for (std::size_t i = 0; i < rows; ++i) chain.k.intt(chain.primes[i], digits.data() + i * n, target + i * n);
  for (std::size_t row = 0; row <= rows; ++row) {
    const std::size_t j = row < rows ? row : s;
    const Prime<W>& prime = chain.primes[j];
    for (std::size_t i = 0; i < rows; ++i) {
      chain.k.reduce(prime, lifted.data(), digits.data() + i * n);
      chain.k.ntt(prime, lifted.data(), lifted.data());
      chain.k.scale(prime, b0.data(), key[i].limb(0, j), prime.mod.square);  // into Montgomery form
      chain.k.scale(prime, b1.data(), key[i].limb(1, j), prime.mod.square);
      const W* a = lifted.data();
      const W *p0 = b0.data(), *p1 = b1.data();
      chain.k.dot_key(prime, sums.limb(0, row), sums.limb(1, row), &a, &p0, &p1, 1, i > 0);
    }
  }
  for (std::size_t half = 0; half < 2; ++half) {
    chain.k.intt(chain.primes[s], b0.data(), sums.limb(half, rows));
    for (std::size_t j = 0; j < rows; ++j) {
      const Prime<W>& prime = chain.primes[j];
      chain.k.round_lift(prime, lifted.data(), b0.data(), chain.mod(s).q);
      chain.k.ntt(prime, lifted.data(), lifted.data());
      chain.k.sub_scale(prime, out.limb(half, j), sums.limb(half, j), lifted.data(), chain.inverse[s][j]);
    }
  }
  return out;
}

}  // namespace

template <class W>
Polynomials<W> exact_add(const Chain<W>& chain, const Polynomials<W>& a, const Polynomials<W>& b) {
  same_shape(a, b);
  if (a.count != b.count) throw std::invalid_argument("operands of different sizes");
  Polynomials<W> out(a.count, a.rows, a.n);
  for (std::size_t p = 0; p < a.count; ++p)
    for (std::size_t j = 0; j < a.rows; ++j)
      chain.k.add(chain.primes[j], out.limb(p, j), a.limb(p, j), b.limb(p, j));
  return out;
}

template <class W>
Polynomials<W> exact_multiply_plain(const Chain<W>& chain, const Polynomials<W>& a,
                                    const Polynomials<W>& plain) {
  same_shape(a, plain);
  Polynomials<W> out(a.count, a.rows, a.n);
  for (std::size_t p = 0; p < a.count; ++p)
    for (std::size_t j = 0; j < a.rows; ++j)
      chain.k.mul(chain.primes[j], out.limb(p, j), a.limb(p, j), plain.limb(0, j));
  return out;
}

template <class W>
Polynomials<W> exact_multiply(const Chain<W>& chain, const Polynomials<W>& a, const Polynomials<W>& b) {
  same_shape(a, b);
  if (a.count != 2 || b.count != 2) throw std::invalid_argument("a product takes two polynomials each");
  Polynomials<W> out(3, a.rows, a.n);
  for (std::size_t j = 0; j < a.rows; ++j)
    chain.k.tensor(chain.primes[j], out.limb(0, j), out.limb(1, j), out.limb(2, j), a.limb(0, j),
                   a.limb(1, j), b.limb(0, j), b.limb(1, j));
  return out;
}

template <class W>
Polynomials<W> exact_relinearise(const Chain<W>& chain, const Polynomials<W>& a, const SealKey<W>& key) {
  if (a.count != 3) throw std::invalid_argument("relinearisation takes three polynomials");
  Polynomials<W> out = switched(chain, a.limb(2, 0), a.rows, key);
  for (std::size_t p = 0; p < 2; ++p)
    for (std::size_t j = 0; j < a.rows; ++j)
      chain.k.add(chain.primes[j], out.limb(p, j), out.limb(p, j), a.limb(p, j));
  return out;
}

template <class W>
Polynomials<W> exact_rotate(const Chain<W>& chain, const Polynomials<W>& a, u32 element,
                            const SealKey<W>& key) {
  if (a.count != 2) throw std::invalid_argument("a rotation takes two polynomials");
  const Automorphism turn(element, chain.log_n);
  Polynomials<W> turned(2, a.rows, a.n);
  for (std::size_t p = 0; p < 2; ++p)
    for (std::size_t j = 0; j < a.rows; ++j) chain.k.permute(turn, 0, a.n, turned.limb(p, j), a.limb(p, j));
  Polynomials<W> out = switched(chain, turned.limb(1, 0), a.rows, key);
  for (std::size_t j = 0; j < a.rows; ++j)
    chain.k.add(chain.primes[j], out.limb(0, j), out.limb(0, j), turned.limb(0, j));
  return out;
}

template <class W>
Polynomials<W> exact_rescale(const Chain<W>& chain, const Polynomials<W>& a) {
  if (a.rows < 2) throw std::invalid_argument("no level is left to rescale");
  const std::size_t last = a.rows - 1;
  Polynomials<W> out(a.count, last, a.n);
  Buffer<W> y(a.n), t(a.n);
  for (std::size_t p = 0; p < a.count; ++p) {
    chain.k.intt(chain.primes[last], y.data(), a.limb(p, last));
    for (std::size_t j = 0; j < last; ++j) {
      const Prime<W>& prime = chain.primes[j];
      chain.k.round_lift(prime, t.data(), y.data(), chain.mod(last).q);
      chain.k.ntt(prime, t.data(), t.data());
      chain.k.sub_scale(prime, out.limb(p, j), a.limb(p, j), t.data(), chain.inverse[last][j]);
    }
  }
  return out;
}

template <class W>
Polynomials<W> exact_mod_switch(const Polynomials<W>& a) {
  if (a.rows < 2) throw std::invalid_argument("no level is left to drop");
  Polynomials<W> out(a.count, a.rows - 1, a.n);
  for (std::size_t p = 0; p < a.count; ++p)
    std::memcpy(out.limb(p, 0), a.limb(p, 0), out.rows * a.n * sizeof(W));
  return out;
}

#define BLINDTAIL_EXACT(W)                                                                               \
  template Polynomials<W> exact_add(const Chain<W>&, const Polynomials<W>&, const Polynomials<W>&);      \
  template Polynomials<W> exact_multiply_plain(const Chain<W>&, const Polynomials<W>&,                   \
                                               const Polynomials<W>&);                                   \
  template Polynomials<W> exact_multiply(const Chain<W>&, const Polynomials<W>&, const Polynomials<W>&); \
  template Polynomials<W> exact_relinearise(const Chain<W>&, const Polynomials<W>&, const SealKey<W>&);  \
  template Polynomials<W> exact_rotate(const Chain<W>&, const Polynomials<W>&, u32, const SealKey<W>&);  \
  template Polynomials<W> exact_rescale(const Chain<W>&, const Polynomials<W>&);                         \
  template Polynomials<W> exact_mod_switch(const Polynomials<W>&);

BLINDTAIL_EXACT(u32)
BLINDTAIL_EXACT(u64)

}  // namespace blindtail
