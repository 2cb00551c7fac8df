// Plans whose steps read other values than the one before.
//
// Every value is kept in NTT form, c0 and c1, until its last use; a step loads its operands into the
// engine's buffers, at its own level (a limb that is not read is a prime dropped: no arithmetic), and runs
// as in a chain. A map of several operands adds their products up before anything is divided, so that
// joining values costs no level and no key switch of its own.
#include <algorithm>
#include <cstring>

#include "engine.hpp"

namespace blindtail {

/// Buffers by value: one is free again after the last step that reads it.
template <class W>
void Engine<W>::place_values() {
  std::vector<std::size_t> last(steps_.size() + 1, 0);
  for (std::size_t i = 0; i < steps_.size(); ++i)
    for (std::size_t source : steps_[i].sources) last[source] = i;
  std::vector<std::size_t> free;
  std::size_t buffers = 0;
  const auto take = [&] {
    if (free.empty()) return buffers++;
    const std::size_t found = free.back();
    free.pop_back();
    return found;
  };
  places_.push_back({take(), input_level_});
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    // A step's result is written after it has read everything.
    for (std::size_t v = 0; v <= i; ++v)
      if (last[v] == i && std::find(step.sources.begin(), step.sources.end(), v) != step.sources.end())
        free.push_back(places_[v].buffer);
    places_.push_back({take(), step.kind == Kind::kSum ? step.level : step.level - 1});
  }
  for (std::size_t i = 0; i < buffers; ++i) values_.emplace_back(2 * max_rows_ * n());
}

/// A value's c0, times P, and digits of its c1, at `level`; those only where it is `turned`.
template <class W>
void Engine<W>::load(std::size_t value, std::size_t level, bool turned) {
  const W *c0 = kept(value, 0), *c1 = kept(value, 1);
  pool_->each(level + 1, [&](std::size_t j, std::size_t) {
    chain_.k.scale(chain_.primes[j], c0_.data() + j * n(), c0 + j * n(), chain_.value[chain_.special()][j]);
    rows_[j * max_rows_ + j] = c1 + j * n();
    if (turned) chain_.k.intt(chain_.primes[j], coef_.data() + j * n(), c1 + j * n());
  });
  if (turned) decompose(level, c1);
}

template <class W>
void Engine<W>::graph_map(const Step& step, const Keys<W>& keys) {
  const MapStep<W>& map = *step.map;
  for (std::size_t input = 0; input < step.sources.size(); ++input) {
    bool turned = false;
    for (std::size_t b = 0; b < map.babies.size(); ++b)
      turned = turned || (map.inputs[b] == input && map.babies[b] != 1);
    load(step.sources[input], map.level, turned);
    map_products(map, keys, input);
  }
  giant_steps(map, keys);
  const bool last = &step == &steps_.back();
  finish_map(map, keys, last, !last);
}

template <class W>
void Engine<W>::run_graph(const Keys<W>& keys) {
  for (std::size_t j = 0; j <= input_level_; ++j) {
    std::memcpy(kept(0, 0) + j * n(), c0_.data() + j * n(), n() * sizeof(W));
    std::memcpy(kept(0, 1) + j * n(), c1_.data() + j * n(), n() * sizeof(W));
  }
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    const std::size_t level = step.level;
    const W *a0 = kept(step.sources[0], 0), *a1 = kept(step.sources[0], 1);
    const W *b0 = kept(step.sources.back(), 0), *b1 = kept(step.sources.back(), 1);
    if (step.kind == Kind::kMap) {
      graph_map(step, keys);
    } else if (step.kind == Kind::kSum) {
      pool_->each(level + 1, [&](std::size_t j, std::size_t) {
        const Prime<W>& prime = chain_.primes[j];
        const std::size_t at = j * n();
        W *c0 = c0_.data() + at, *c1 = c1_.data() + at;
        std::memcpy(c0, a0 + at, n() * sizeof(W));
        std::memcpy(c1, a1 + at, n() * sizeof(W));
        if (step.sources.size() > 1) {
          chain_.k.add(prime, c0, c0, b0 + at);
          chain_.k.add(prime, c1, c1, b1 + at);
        }
        if (step.constant.size()) chain_.k.add(prime, c0, c0, step.constant.data() + at);
      });
    } else {
      pool_->each(level + 1, [&](std::size_t j, std::size_t) {
        const std::size_t at = j * n();
        W* d2 = work_.data() + at;
        chain_.k.tensor(chain_.primes[j], sum(1, 0) + at, sum(1, 1) + at, d2, a0 + at, a1 + at, b0 + at,
                        b1 + at);
        chain_.k.intt(chain_.primes[j], coef_.data() + at, d2);
      });
      relinearise(level, keys);
      mod_down_rescale(level, {{sum(0, 0), c0_.data(), Form::kNtt}, {sum(0, 1), c1_.data(), Form::kNtt}});
    }
    if (i + 1 == steps_.size()) break;
    const std::size_t rows = places_[i + 1].level + 1;
    std::memcpy(kept(i + 1, 0), c0_.data(), rows * n() * sizeof(W));
    std::memcpy(kept(i + 1, 1), c1_.data(), rows * n() * sizeof(W));
  }
}

// Members of this file; engine.cpp has the others.
#define BLINDTAIL_GRAPH(W)                                         \
  template void Engine<W>::place_values();                         \
  template void Engine<W>::load(std::size_t, std::size_t, bool);   \
  template void Engine<W>::graph_map(const Step&, const Keys<W>&); \
  template void Engine<W>::run_graph(const Keys<W>&);

BLINDTAIL_GRAPH(u32)
BLINDTAIL_GRAPH(u64)

}  // namespace blindtail
