// Dividing by P, and by P and a data prime at once: how sums modulo Q P become a ciphertext again.
#include "engine.hpp"

namespace blindtail {

template <class W>
void Engine<W>::put(const Half& half, std::size_t row, Block block, const W* x, const W* t, W factor) {
  const Part<W> part(chain_.primes[row], block.count);
  const std::size_t at = row * n() + block.first;
  chain_.k.sub_scale(part, half.out + at, x, t, factor);
  if (half.plus != nullptr) chain_.k.add(part, half.out + at, half.out + at, half.plus + at);
}

template <class W>
void Engine<W>::mod_down(std::size_t level, std::initializer_list<Half> halves) {
  const std::size_t s = chain_.special();
  const Half* half = halves.begin();
  W* y = work_.data() + max_rows_ * n();  // modulo P, coefficient form, by half
  const auto row_of = [&](std::size_t j, const Half& h) { return h.in + j * n(); };
  if (halves.size() == 1 && half->form == Form::kCoefficient && pool_->threads() > 1) {
    // All rows at once, so that nobody waits for P's; what is left goes word by word.
    pool_->each(level + 2, [&](std::size_t row, std::size_t) {
      if (row > level)
        chain_.k.intt(chain_.primes[s], y, row_of(row, *half));
      else
        chain_.k.intt(chain_.primes[row], half->out + row * n(), row_of(row, *half));
    });
    each_block(level + 1, [&](std::size_t j, Block block, std::size_t thread) {
      W* t = scratch(thread, 0);
      chain_.k.round_lift({chain_.primes[j], block.count}, t, y + block.first, chain_.mod(s).q);
      put(*half, j, block, half->out + j * n() + block.first, t, chain_.inverse[s][j]);
    });
    return;
  }
  pool_->each(halves.size(), [&](std::size_t h, std::size_t) {
    chain_.k.intt(chain_.primes[s], y + h * n(), row_of(level + 1, half[h]));
  });
  pool_->each((level + 1) * halves.size(), [&](std::size_t item, std::size_t thread) {
    const std::size_t j = item / halves.size(), h = item % halves.size();
    const Prime<W>& prime = chain_.primes[j];
    W* t = scratch(thread, 0);
    chain_.k.round_lift(prime, t, y + h * n(), chain_.mod(s).q);
    const W* x = row_of(j, half[h]);
    if (half[h].form != Form::kCoefficient) {
      chain_.k.ntt(prime, t, t);
    } else {
      chain_.k.intt(prime, scratch(thread, 1), x);
      x = scratch(thread, 1);
    }
    put(half[h], j, {0, n()}, x, t, chain_.inverse[s][j]);
  });
}

template <class W>
void Engine<W>::mod_down_rescale(std::size_t level, std::initializer_list<Half> halves) {
  const std::size_t s = chain_.special();
  const Half* half = halves.begin();
  // By half: modulo P and modulo q_level, coefficient form, and the difference of both.
  const auto limb = [&](std::size_t h, std::size_t i) {
    return work_.data() + (max_rows_ + 3 * h + i) * n();
  };
  pool_->each(2 * halves.size(), [&](std::size_t item, std::size_t) {
    const std::size_t h = item / 2, i = item % 2;
    chain_.k.intt(chain_.primes[i ? level : s], limb(h, i), half[h].in + (i ? level : level + 1) * n());
  });
  each_block(halves.size(), [&](std::size_t h, Block block, std::size_t) {
    const std::size_t at = block.first;
    chain_.k.pair_high({chain_.primes[s], block.count}, limb(h, 2) + at, limb(h, 0) + at, limb(h, 1) + at,
                       chain_.inverse[level][s]);
  });
  pool_->each(level * halves.size(), [&](std::size_t item, std::size_t thread) {
    const std::size_t j = item / halves.size(), h = item % halves.size();
    const Prime<W>& prime = chain_.primes[j];
    W* t = scratch(thread, 0);
    chain_.k.pair_lift(prime, t, limb(h, 1), limb(h, 2), chain_.mod(s).q, chain_.mod(level).q,
                       chain_.value[level][j]);
    const W* x = half[h].in + j * n();
    if (half[h].form != Form::kCoefficient) {
      chain_.k.ntt(prime, t, t);
    } else {
      chain_.k.intt(prime, scratch(thread, 1), x);
      x = scratch(thread, 1);
    }
    // Times P: not divided by it.
    const W inverse = chain_.inverse[level][j];
    const W factor =
        half[h].form == Form::kTimesP ? inverse : chain_.mod(j).mul(chain_.inverse[s][j], inverse);
    put(half[h], j, {0, n()}, x, t, factor);
  });
}

// Members of this file; engine.cpp has the others.
#define BLINDTAIL_DIVIDE(W)                                                             \
  template void Engine<W>::put(const Half&, std::size_t, Block, const W*, const W*, W); \
  template void Engine<W>::mod_down(std::size_t, std::initializer_list<Half>);          \
  template void Engine<W>::mod_down_rescale(std::size_t, std::initializer_list<Half>);

BLINDTAIL_DIVIDE(u32)
BLINDTAIL_DIVIDE(u64)

}  // namespace blindtail
