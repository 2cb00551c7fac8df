#include "ring.hpp"

#include <stdexcept>

namespace blindtail {

u32 reverse_bits(u32 value, int bits) {
  u32 out = 0;
  for (int i = 0; i < bits; ++i) out |= ((value >> i) & 1u) << (bits - 1 - i);
  return out;
}

namespace {

/// The smallest primitive 2N-th root of unity modulo q, as SEAL's try_minimal_primitive_root finds it.
template <class W>
W minimal_root(const Modulus<W>& mod, u64 degree) {
  const u64 exponent = (mod.q - 1) / degree;
  W root = 0;
  for (W candidate = 2;; ++candidate) {
    if (candidate >= 4096) throw std::invalid_argument("no primitive root of unity: not a prime?");
    root = mod.power(candidate, exponent);
    if (mod.power(root, degree / 2) == mod.q - 1) break;
  }
  // All primitive roots are odd powers of one.
  const W step = mod.to_montgomery(mod.mul(root, mod.to_montgomery(root)));
  W best = root, current = root;
  for (u64 i = 0; i < degree / 2; ++i) {
    if (current < best) best = current;
    current = mod.mul(current, step);
  }
  return best;
}

}  // namespace

template <class W>
Prime<W>::Prime(W q, int log) : log_n(log), n(std::size_t{1} << log) {
  constexpr W kLimit = W{1} << (kBits<W> == 32 ? 30 : 60);
  if (log < 5 || log > 16 || q >= kLimit || q < 3 || (q - 1) % (2 * n) != 0)
    throw std::invalid_argument("a prime must be 1 mod 2N and within its word's range");
  mod = Modulus<W>(q);
  const W psi = minimal_root(mod, 2 * n);
  const W psi_inverse = mod.inverse_of(psi);
  roots = Buffer<W>(n);
  roots_shoup = Buffer<W>(n);
  inverse_roots = Buffer<W>(n);
  inverse_roots_shoup = Buffer<W>(n);
  const W step = mod.to_montgomery(psi), inverse_step = mod.to_montgomery(psi_inverse);
  W power = 1, inverse_power = 1;
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t at = reverse_bits(static_cast<u32>(i), log);
    roots[at] = power;
    roots_shoup[at] = shoup(power, q);
    inverse_roots[at] = inverse_power;
    inverse_roots_shoup[at] = shoup(inverse_power, q);
    power = mod.mul(power, step);
    inverse_power = mod.mul(inverse_power, inverse_step);
  }
  n_inverse = mod.inverse_of(static_cast<W>(n % q));
  n_inverse_shoup = shoup(n_inverse, q);
  last_root = mod.mul(n_inverse, mod.to_montgomery(inverse_roots[1]));
  last_root_shoup = shoup(last_root, q);
}

template struct Prime<u32>;
template struct Prime<u64>;

Automorphism::Automorphism(u32 g, int log_n) : element(g) {
  const u32 n = u32{1} << log_n, mask = 2 * n - 1;
  if (g % 2 == 0 || g > mask) throw std::invalid_argument("a Galois element is odd and below 2N");
  // Position i holds the value at psi^(2 bitrev(i) + 1).
  index.resize(n);
  for (u32 i = 0; i < n; ++i) {
    const u32 exponent = (static_cast<u64>(g) * (2 * reverse_bits(i, log_n) + 1)) & mask;
    index[i] = reverse_bits((exponent - 1) / 2, log_n);
  }
  group.resize(n / 16);
  lanes.resize(n / 16);
  for (u32 b = 0; b < n / 16; ++b) {
    group[b] = index[16 * b] / 16;
    u32 row = 0;
    const u32 rows = static_cast<u32>(orders.size() / 16);
    for (; row < rows; ++row) {
      bool same = true;
      for (u32 i = 0; i < 16 && same; ++i) same = orders[16 * row + i] == index[16 * b + i] % 16;
      if (same) break;
    }
    if (row == rows)
      for (u32 i = 0; i < 16; ++i) orders.push_back(index[16 * b + i] % 16);
    lanes[b] = row;
    for (u32 i = 0; i < 16; ++i)
      if (index[16 * b + i] / 16 != group[b]) throw std::logic_error("an automorphism left its group");
  }
}

}  // namespace blindtail
