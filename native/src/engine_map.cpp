// Maps: rotated operands times diagonals, giant steps, folds.
//
// The tiles of one wide map read the same values. They are run as one group: an operand's digits and each of
// its rotations, which cost far more than products, are made once, and every map adds its own products up.
#include <algorithm>
#include <cstring>

#include "engine.hpp"

namespace blindtail {

/// Consecutive maps whose sums together take `most_bytes` at most. None can read another's result: what they
/// all read was there before the first of them.
template <class W>
void Engine<W>::make_groups(std::size_t most_bytes) {
  const std::size_t sum_bytes = 2 * (max_rows_ + 1) * n() * sizeof(W);
  std::size_t sums = 0, limbs = 0;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    Step& step = steps_[i];
    if (!step.map) continue;
    const MapStep<W>& map = *step.map;
    // Folds take turns between two.
    const std::size_t own = std::max(map.giants.size(), std::min<std::size_t>(map.folds.size(), 2));
    const bool joins = i > 0 && steps_[i - 1].map && steps_[i - 1].level == step.level &&
                       steps_[i - 1].sources == step.sources && sums + own <= most_bytes / sum_bytes;
    if (!joins) {
      groups_.push_back({i, 0, std::vector<std::vector<u32>>(step.sources.size())});
      sums = 0;
    }
    MapGroup& group = groups_.back();
    ++group.count;
    step.group = groups_.size() - 1;
    step.sums = sums;
    sums += own;
    max_sums_ = std::max(max_sums_, sums);
    for (std::size_t b = 0; b < map.babies.size(); ++b) {
      auto& turns = group.turns[map.inputs[b]];
      const auto found = std::find(turns.begin(), turns.end(), map.babies[b]);
      step.turns.push_back(static_cast<std::size_t>(found - turns.begin()));
      if (found == turns.end()) turns.push_back(map.babies[b]);
      limbs = std::max(limbs, 2 * turns.size());
    }
    limbs = std::max(limbs, map.babies.size());  // tickets turn c0 alone, but by every baby step
  }
  max_sums_ = std::max<std::size_t>(max_sums_, 2);  // squares use two
  scratch_limbs_ = limbs + kTemporaries;
}

template <class W>
std::vector<std::size_t> Engine<W>::groups() const {
  std::vector<std::size_t> sizes;
  for (const MapGroup& group : groups_) sizes.push_back(group.count);
  return sizes;
}

/// All giant steps' sums modulo Q P of a group's maps, from c0_ (times P) and the digits: rotated inputs,
/// then products. An automorphism takes each block of a row from one block, so that blocks are independent.
template <class W>
void Engine<W>::map_products(const MapGroup& group, const Keys<W>& keys, std::size_t input) {
  each_block(steps_[group.first].level + 2, [&](std::size_t row, Block block, std::size_t thread) {
    turn_block(group, keys, input, row, block, thread);
    for (std::size_t i = 0; i < group.count; ++i)
      add_products(steps_[group.first + i], input, row, block, thread);
  });
}

/// One block of every rotation of an operand, times P, to where `turned` is.
template <class W>
void Engine<W>::turn_block(const MapGroup& group, const Keys<W>& keys, std::size_t input, std::size_t row,
                           Block block, std::size_t thread) {
  const std::size_t level = steps_[group.first].level, j = prime_of(row, level);
  const Part<W> part(chain_.primes[j], block.count);
  const bool special = row > level;
  const W* c0 = c0_.data() + row * n();  // not read modulo P, where P times anything vanishes
  W *t0 = scratch(thread, 0, block.count), *t1 = scratch(thread, 1, block.count);
  const std::vector<u32>& elements = group.turns[input];
  for (std::size_t i = 0; i < elements.size(); ++i) {
    W *out0 = turned(i, 0, block, thread), *out1 = turned(i, 1, block, thread);
    if (elements[i] == 1) {
      if (special) continue;
      std::memcpy(out0, c0 + block.first, block.count * sizeof(W));
      chain_.k.scale(part, out1, rows_[row * max_rows_ + row] + block.first,
                     chain_.value[chain_.special()][j]);
      continue;
    }
    const Automorphism& turn = automorphism(elements[i]);
    const Block from = source(turn, block);
    switch_row(keys.at(elements[i]), level, row, from, t0, t1);
    if (!special) chain_.k.add(part, t0, t0, c0 + from.first);
    chain_.k.permute(turn, block.first, block.count, out0, t0);
    chain_.k.permute(turn, block.first, block.count, out1, t1);
  }
}

/// One block of a map's products with an operand's rotations, added to what operands before gave.
template <class W>
void Engine<W>::add_products(const Step& step, std::size_t input, std::size_t row, Block block,
                             std::size_t thread) {
  const MapStep<W>& map = *step.map;
  const Part<W> part(chain_.primes[prime_of(row, map.level)], block.count);
  const bool special = row > map.level;
  const W* in0[kMaxTerms];
  const W* in1[kMaxTerms];
  const W* plain[kMaxTerms];
  for (std::size_t g = 0; g < map.giants.size(); ++g) {
    W* out0 = sum(step.sums + g, 0) + row * n() + block.first;
    W* out1 = sum(step.sums + g, 1) + row * n() + block.first;
    std::size_t count = 0;
    bool any = input > 0;
    const auto flush = [&] {
      if (count) chain_.k.dot_plain(part, out0, out1, in0, in1, plain, count, any);
      any = any || count;
      count = 0;
    };
    for (const auto& term : map.giants[g]) {
      if (map.inputs[term.baby] != input || (special && map.babies[term.baby] == 1)) continue;
      in0[count] = turned(step.turns[term.baby], 0, block, thread);
      in1[count] = turned(step.turns[term.baby], 1, block, thread);
      plain[count] = map.plain.data() + (row * map.diagonals + term.diagonal) * n() + block.first;
      if (++count == kMaxTerms) flush();
    }
    flush();
    if (!any) {
      std::memset(out0, 0, block.count * sizeof(W));
      std::memset(out1, 0, block.count * sizeof(W));
    }
  }
}

template <class W>
void Engine<W>::map_sums(const Step& step, const Keys<W>& keys) {
  map_products(groups_[step.group], keys);
  giant_steps(step, keys);
}

template <class W>
void Engine<W>::giant_steps(const Step& step, const Keys<W>& keys) {
  const MapStep<W>& map = *step.map;
  const std::size_t level = map.level;
  // Horner: total = rotate(total) + next, from the last giant step down.
  for (std::size_t g = map.giants.size(); g-- > 1;) {
    const std::size_t at = step.sums + g;
    mod_down(level, {{sum(at, 1), coef_.data(), Form::kCoefficient}});
    decompose(level, nullptr);
    const Key<W>& giant = keys.at(map.giant);
    const Automorphism& turn = automorphism(map.giant);
    each_block(level + 2, [&](std::size_t row, Block block, std::size_t thread) {
      const Part<W> part(chain_.primes[prime_of(row, level)], block.count);
      const Block from = source(turn, block);
      W *t0 = scratch(thread, 0, block.count), *t1 = scratch(thread, 1, block.count);
      switch_row(giant, level, row, from, t0, t1);
      chain_.k.add(part, t0, t0, sum(at, 0) + row * n() + from.first);
      chain_.k.permute_add(part, turn, block.first, sum(at - 1, 0) + row * n() + block.first, t0);
      chain_.k.permute_add(part, turn, block.first, sum(at - 1, 1) + row * n() + block.first, t1);
    });
  }
}

template <class W>
void Engine<W>::run_map(const Step& step, const Keys<W>& keys, bool last, bool next_square) {
  map_sums(step, keys);
  finish_map(step, keys, last, next_square);
}

template <class W>
void Engine<W>::finish_map(const Step& step, const Keys<W>& keys, bool last, bool next_square) {
  const MapStep<W>& map = *step.map;
  const std::size_t level = map.level, sums = step.sums;
  const Form form0 = last ? Form::kCoefficient : Form::kNtt;
  const Form form1 = next_square ? Form::kNtt : Form::kCoefficient;
  W* c1 = (next_square ? c1_ : coef_).data();
  const W* bias = map.bias.data();
  if (map.folds.empty()) {
    mod_down_rescale(level, {{sum(sums, 0), c0_.data(), form0, bias}, {sum(sums, 1), c1, form1}});
    return;
  }
  mod_down_rescale(
      level, {{sum(sums, 0), c0_.data(), Form::kTimesP}, {sum(sums, 1), coef_.data(), Form::kCoefficient}});
  const std::size_t at = fold_all(map, keys, sums);
  mod_down(level - 1, {{sum(at, 0), c0_.data(), form0, bias}, {sum(at, 1), c1, form1}});
}

/// All groups of folds, from c0_ (times P) and coef_, in the sums `sums` and the next one; returns which of
/// them holds the result, modulo Q P.
template <class W>
std::size_t Engine<W>::fold_all(const MapStep<W>& step, const Keys<W>& keys, std::size_t sums) {
  for (std::size_t group = 0; group < step.folds.size(); ++group) {
    if (group > 0)
      mod_down(step.level - 1, {{sum(sums + (group + 1) % 2, 1), coef_.data(), Form::kCoefficient}});
    decompose(step.level - 1, nullptr);
    fold(step, keys, group, sums);
  }
  return sums + (step.folds.size() + 1) % 2;
}

/// One group of folds: acc + sum of rotations of acc, into sum(sums + group % 2); acc is (c0_, digits) for
/// the first group, else sum(sums + (group + 1) % 2).
template <class W>
void Engine<W>::fold(const MapStep<W>& step, const Keys<W>& keys, std::size_t group, std::size_t sums) {
  const std::size_t level = step.level - 1, rows = level + 2;
  each_block(rows, [&](std::size_t row, Block block, std::size_t thread) {
    const std::size_t j = prime_of(row, level), at = row * n() + block.first;
    const std::size_t bytes = block.count * sizeof(W);
    const Part<W> part(chain_.primes[j], block.count);
    W *t0 = scratch(thread, 0, block.count), *t1 = scratch(thread, 1, block.count);
    W *out0 = sum(sums + group % 2, 0) + at, *out1 = sum(sums + group % 2, 1) + at;
    // What every rotation turns besides the switched part: of P c0, nothing modulo P.
    const W* base = group > 0 ? sum(sums + (group + 1) % 2, 0) + row * n() : c0_.data() + row * n();
    if (group == 0 && row == rows - 1) {
      base = nullptr;
      std::memset(out0, 0, bytes);
      std::memset(out1, 0, bytes);
    } else {
      std::memcpy(out0, base + block.first, bytes);
      if (group > 0)
        std::memcpy(out1, sum(sums + (group + 1) % 2, 1) + at, bytes);
      else
        chain_.k.scale(part, out1, rows_[row * max_rows_ + row] + block.first,
                       chain_.value[chain_.special()][j]);
    }
    for (u32 element : step.folds[group]) {
      const Automorphism& turn = automorphism(element);
      const Block from = source(turn, block);
      switch_row(keys.at(element), level, row, from, t0, t1);
      if (base != nullptr) chain_.k.add(part, t0, t0, base + from.first);
      chain_.k.permute_add(part, turn, block.first, out0, t0);
      chain_.k.permute_add(part, turn, block.first, out1, t1);
    }
  });
}

// Members of this file; engine.cpp has the others.
#define BLINDTAIL_MAPS(W)                                                                               \
  template void Engine<W>::make_groups(std::size_t);                                                    \
  template std::vector<std::size_t> Engine<W>::groups() const;                                          \
  template void Engine<W>::map_products(const MapGroup&, const Keys<W>&, std::size_t);                  \
  template void Engine<W>::turn_block(const MapGroup&, const Keys<W>&, std::size_t, std::size_t, Block, \
                                      std::size_t);                                                     \
  template void Engine<W>::add_products(const Step&, std::size_t, std::size_t, Block, std::size_t);     \
  template void Engine<W>::map_sums(const Step&, const Keys<W>&);                                       \
  template void Engine<W>::giant_steps(const Step&, const Keys<W>&);                                    \
  template void Engine<W>::run_map(const Step&, const Keys<W>&, bool, bool);                            \
  template void Engine<W>::finish_map(const Step&, const Keys<W>&, bool, bool);                         \
  template std::size_t Engine<W>::fold_all(const MapStep<W>&, const Keys<W>&, std::size_t);             \
  template void Engine<W>::fold(const MapStep<W>&, const Keys<W>&, std::size_t, std::size_t);

BLINDTAIL_MAPS(u32)
BLINDTAIL_MAPS(u64)

}  // namespace blindtail
