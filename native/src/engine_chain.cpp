#include <algorithm>
#include <stdexcept>
#include <string>

#include "engine.hpp"

namespace blindtail {

template <class W>
Chain<W>::Chain(int log, std::span<const u64> list, const char* instructions)
    : log_n(log), n(std::size_t{1} << log), k(kernels<W>(instructions)) {
  if (list.size() < 2 || list.size() > 40) throw std::invalid_argument("between 2 and 40 primes");
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (list[i] >= (u64{1} << (kBits<W> == 32 ? 30 : 60)))
      throw std::invalid_argument("a prime is beyond the word's range");
    if (std::find(list.begin(), list.begin() + static_cast<std::ptrdiff_t>(i), list[i]) !=
        list.begin() + static_cast<std::ptrdiff_t>(i))
      throw std::invalid_argument("primes must be distinct");
    primes.emplace_back(static_cast<W>(list[i]), log);
  }
  // 32-bit words reduce nothing when a residue changes its prime: the primes must be of one size.
  const auto [low, high] = std::minmax_element(list.begin(), list.end());
  if (kBits<W> == 32 && *high >= 2 * *low)
    throw std::invalid_argument("32-bit words need primes of one size");
  value.resize(list.size());
  inverse.resize(list.size());
  for (std::size_t i = 0; i < list.size(); ++i)
    for (std::size_t j = 0; j < list.size(); ++j) {
      const Modulus<W>& m = mod(j);
      const W residue = static_cast<W>(list[i] % m.q);
      value[i].push_back(m.to_montgomery(residue));
      inverse[i].push_back(i == j ? 0 : m.to_montgomery(m.inverse_of(residue)));
    }
}

template <class W>
void Chain<W>::lift(std::size_t to, W* out, const W* in, std::size_t from) const {
  const W q = mod(to).q, p = mod(from).q;
  if (p < 2 * q) {
    k.lift_centred(primes[to], out, in, p);
    return;
  }
  for (std::size_t i = 0; i < n; ++i) {
    const W x = in[i];
    const W magnitude = (x > p / 2 ? p - x : x) % q;
    out[i] = x > p / 2 ? q - magnitude : magnitude;
  }
}

template struct Chain<u32>;
template struct Chain<u64>;

}  // namespace blindtail
