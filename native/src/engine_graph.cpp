// Plans whose steps read other values than the one before, or that have several inputs or outputs.
//
// Every value is kept in NTT form, c0 and c1, until its last use; a step loads its operands into the
// engine's buffers, at its own level (a limb that is not read is a prime dropped: no arithmetic), and runs
// as in a chain. A map of several operands adds their products up before anything is divided, so that
// joining values costs no level and no key switch of its own; maps of the same values are run as one
// (engine_map.cpp).
#include <algorithm>
#include <cstring>

#include "engine.hpp"

namespace blindtail {

/// Buffers by value: one is free again after the last step that reads it. Outputs need none; maps of a group
/// read the same values, which are then held until the last of them.
template <class W>
void Engine<W>::place_values() {
  std::vector<std::size_t> last(inputs_ + steps_.size(), 0);
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
  for (std::size_t i = 0; i < inputs_; ++i) places_.push_back({take(), input_level_});
  for (std::size_t i = 0; !is_output(i); ++i) {
    const Step& step = steps_[i];
    // A step's result is written after it has read everything.
    for (std::size_t v = 0; v < inputs_ + i; ++v)
      if (last[v] == i && std::find(step.sources.begin(), step.sources.end(), v) != step.sources.end())
        free.push_back(places_[v].buffer);
    places_.push_back({take(), step.kind == Kind::kSum ? step.level : step.level - 1});
  }
  for (std::size_t i = 0; i < buffers; ++i) values_.emplace_back(2 * max_rows_ * n());
  results_ = Buffer<W>(outputs_ * 2 * n());
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

/// A group's sums from its operands, then each map's result, to where it is kept.
template <class W>
void Engine<W>::run_group(const MapGroup& group, const Keys<W>& keys) {
  const Step& first = steps_[group.first];
  for (std::size_t input = 0; input < first.sources.size(); ++input) {
    const std::vector<u32>& turns = group.turns[input];
    const bool turned = std::any_of(turns.begin(), turns.end(), [](u32 element) { return element != 1; });
    load(first.sources[input], first.level, turned);
    map_products(group, keys, input);
  }
  for (std::size_t i = group.first; i < group.first + group.count; ++i) {
    giant_steps(steps_[i], keys);
    finish_map(steps_[i], keys, is_output(i), !is_output(i));
    keep(i);
  }
}

template <class W>
void Engine<W>::graph_sum(const Step& step) {
  const W *a0 = kept(step.sources[0], 0), *a1 = kept(step.sources[0], 1);
  const W *b0 = kept(step.sources.back(), 0), *b1 = kept(step.sources.back(), 1);
  pool_->each(step.level + 1, [&](std::size_t j, std::size_t) {
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
}

/// Of two values, or a square.
template <class W>
void Engine<W>::graph_product(const Step& step, const Keys<W>& keys) {
  const W *a0 = kept(step.sources[0], 0), *a1 = kept(step.sources[0], 1);
  const W *b0 = kept(step.sources.back(), 0), *b1 = kept(step.sources.back(), 1);
  pool_->each(step.level + 1, [&](std::size_t j, std::size_t) {
    const std::size_t at = j * n();
    W* d2 = work_.data() + at;
    chain_.k.tensor(chain_.primes[j], sum(1, 0) + at, sum(1, 1) + at, d2, a0 + at, a1 + at, b0 + at, b1 + at);
    chain_.k.intt(chain_.primes[j], coef_.data() + at, d2);
  });
  relinearise(step.level, keys);
  mod_down_rescale(step.level, {{sum(0, 0), c0_.data(), Form::kNtt}, {sum(0, 1), c1_.data(), Form::kNtt}});
}

/// A step's result, from c0_ and c1_, or, of an output, c0_ and coef_, to its place.
template <class W>
void Engine<W>::keep(std::size_t step) {
  if (is_output(step)) {
    W* out = results_.data() + (step + outputs_ - steps_.size()) * 2 * n();
    std::memcpy(out, c0_.data(), n() * sizeof(W));
    std::memcpy(out + n(), coef_.data(), n() * sizeof(W));
    return;
  }
  const std::size_t value = inputs_ + step, words = (places_[value].level + 1) * n();
  std::memcpy(kept(value, 0), c0_.data(), words * sizeof(W));
  std::memcpy(kept(value, 1), c1_.data(), words * sizeof(W));
}

template <class W>
void Engine<W>::run_graph(const Keys<W>& keys) {
  for (std::size_t i = 0; i < steps_.size();) {
    const Step& step = steps_[i];
    if (step.map) {
      run_group(groups_[step.group], keys);
      i += groups_[step.group].count;
      continue;
    }
    if (step.kind == Kind::kSum)
      graph_sum(step);
    else
      graph_product(step, keys);
    keep(i++);
  }
}

// Members of this file; engine.cpp has the others.
#define BLINDTAIL_GRAPH(W)                                             \
  template void Engine<W>::place_values();                             \
  template void Engine<W>::load(std::size_t, std::size_t, bool);       \
  template void Engine<W>::run_group(const MapGroup&, const Keys<W>&); \
  template void Engine<W>::graph_sum(const Step&);                     \
  template void Engine<W>::graph_product(const Step&, const Keys<W>&); \
  template void Engine<W>::keep(std::size_t);                          \
  template void Engine<W>::run_graph(const Keys<W>&);

BLINDTAIL_GRAPH(u32)
BLINDTAIL_GRAPH(u64)

}  // namespace blindtail
