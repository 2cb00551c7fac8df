#include "engine.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace blindtail {

template <class W>
Engine<W>::Engine(int log_n, std::span<const u64> primes, const char* instructions, std::size_t inputs)
    : chain_(log_n, primes, instructions), chain_only_(inputs == 1), inputs_(inputs) {
  if (inputs < 1 || inputs > kMostInputs) throw std::invalid_argument("between 1 and 64 inputs");
}

template <class W>
void Engine<W>::use(u32 element) {
  if (element > 1) automorphisms_.try_emplace(element, element, chain_.log_n);
}

template <class W>
const Automorphism& Engine<W>::automorphism(u32 element) const {
  return automorphisms_.at(element);
}

template <class W>
void Engine<W>::add(Step step) {
  const std::size_t index = steps_.size(), value = inputs_ + index - 1;  // the one before
  if (step.sources.empty()) step.sources = {value};
  const std::size_t above = step.kind == Kind::kSum ? 0 : 1;
  for (std::size_t source : step.sources) {
    if (source > value) throw std::invalid_argument("a step reads what is not there yet");
    if (source < inputs_) {
      if (steps_.empty()) input_level_ = step.level;
      if (step.level > input_level_) throw std::invalid_argument("a step above its operand's level");
      continue;
    }
    const Step& from = steps_[source - inputs_];
    if (step.level + (from.kind == Kind::kSum ? 0 : 1) > from.level)
      throw std::invalid_argument("a step above its operand's level");
  }
  if (step.level < above || step.level + 1 >= chain_.primes.size())
    throw std::invalid_argument("a step's level");
  chain_only_ = chain_only_ && step.sources == Sources{value} &&
                step.kind == (index % 2 ? Kind::kSquare : Kind::kMap) && step.level + index == input_level_;
  steps_.push_back(std::move(step));
}

template <class W>
void Engine<W>::add_map(MapStep<W> step, Sources sources) {
  const std::size_t rows = step.level + 2, operands = std::max<std::size_t>(sources.size(), 1);
  if (step.level < 1 || step.level + 1 >= chain_.primes.size()) throw std::invalid_argument("a map's level");
  if (step.plain.size() != rows * step.diagonals * n() || step.bias.size() != step.level * n())
    throw std::invalid_argument("a map's plaintexts");
  if (step.inputs.empty()) step.inputs.assign(step.babies.size(), 0);
  if (step.inputs.size() != step.babies.size() ||
      std::any_of(step.inputs.begin(), step.inputs.end(), [&](std::size_t i) { return i >= operands; }))
    throw std::invalid_argument("a map's operands");
  for (const auto& giant : step.giants)
    for (const auto& term : giant)
      if (term.baby >= step.babies.size() || term.diagonal >= step.diagonals)
        throw std::invalid_argument("a map's steps");
  if (step.giants.empty() || step.giants.back().empty())
    throw std::invalid_argument("a map without products");
  for (u32 element : step.babies) use(element);
  if (step.giants.size() > 1) use(step.giant);
  for (const auto& group : step.folds)
    for (u32 element : group) use(element);
  const std::size_t level = step.level;
  add({Kind::kMap, level, std::move(sources), std::make_unique<MapStep<W>>(std::move(step))});
}

template <class W>
void Engine<W>::add_square(std::size_t level, Sources sources) {
  if (sources.size() > 1) throw std::invalid_argument("a square has one operand");
  add({Kind::kSquare, level, std::move(sources)});
}

template <class W>
void Engine<W>::add_product(std::size_t level, Sources sources) {
  if (sources.size() != 2) throw std::invalid_argument("a product has two operands");
  add({Kind::kProduct, level, std::move(sources)});
}

template <class W>
void Engine<W>::add_sum(std::size_t level, Sources sources, Buffer<W> constant) {
  if (sources.empty() || sources.size() > 2 || (constant.size() && constant.size() != (level + 1) * n()))
    throw std::invalid_argument("a sum's operands");
  add({Kind::kSum, level, std::move(sources), nullptr, std::move(constant)});
}

template <class W>
void Engine<W>::finish(std::size_t outputs, std::size_t group_bytes) {
  if (outputs < 1 || outputs > kMostOutputs) throw std::invalid_argument("between 1 and 64 outputs");
  if (outputs > steps_.size()) throw std::invalid_argument("a program has fewer steps than outputs");
  outputs_ = outputs;
  chain_only_ = chain_only_ && outputs == 1;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    // What comes out at level 0 has its bias in coefficient form, for the reply. Nothing reads it: it is
    // below every map, and only maps follow.
    if (is_output(i) && (!step.map || step.level != 1))
      throw std::invalid_argument("a program ends in a map at level 1, as many as it has outputs");
    if (!is_output(i) && step.level < (step.kind == Kind::kSum ? 1 : 2))
      throw std::invalid_argument("a step before the last ends at level 0");
  }
  max_rows_ = input_level_ + 2;
  make_groups(group_bytes);
  c0_ = Buffer<W>(max_rows_ * n());
  c1_ = Buffer<W>(max_rows_ * n());
  coef_ = Buffer<W>(max_rows_ * n());
  work_ = Buffer<W>((max_rows_ + 6) * n());
  digits_ = Buffer<W>(max_rows_ * max_rows_ * (n() + kGap));
  sums_ = Buffer<W>(max_sums_ * 2 * (max_rows_ + 1) * n());
  rows_.assign(max_rows_ * max_rows_, nullptr);
  if (!chain_only_) place_values();
}

template <class W>
W* Engine<W>::input(std::size_t half, std::size_t prime, std::size_t index) {
  return (!chain_only_ ? kept(index, half) : half ? c1_.data() : c0_.data()) + prime * n();
}

template <class W>
const W* Engine<W>::output(std::size_t half, std::size_t index) const {
  if (!chain_only_) return results_.data() + (2 * index + half) * n();
  return half ? coef_.data() : c0_.data();
}

template <class W>
void Engine<W>::check(const Keys<W>& keys) const {
  const auto need = [&](u32 element, std::size_t level) {
    if (element == 1) return;
    const auto found = keys.find(element);
    if (found == keys.end() || found->second.level < level)
      throw std::out_of_range("an evaluation key is missing or of too low a level");
  };
  for (const Step& step : steps_) {
    if (!step.map) {
      if (step.kind != Kind::kSum) need(0, step.level);
      continue;
    }
    for (u32 element : step.map->babies) need(element, step.map->level);
    if (step.map->giants.size() > 1) need(step.map->giant, step.map->level);
    for (const auto& group : step.map->folds)
      for (u32 element : group) need(element, step.map->level - 1);
  }
}

template <class W>
Pool& Engine<W>::pool(const Keys<W>& keys, std::size_t threads) {
  check(keys);  // nothing after this throws but for memory
  if (pool_ && pool_->threads() == threads) return *pool_;
  pool_.reset();  // should anything below fail, the next run begins anew
  scratch_ = Buffer<W>(threads * scratch_limbs_ * (n() + kGap));
  // Rows alone are too few to be shared evenly.
  blocks_ = 1;
  while (blocks_ < threads && n() / blocks_ >= 2 * kShortest) blocks_ *= 2;
  pool_ = std::make_unique<Pool>(threads);
  return *pool_;
}

template <class W>
void Engine<W>::begin(const Keys<W>& keys, std::size_t threads) {
  pool(keys, threads);
  // c1 in coefficient form is what every keyswitch starts from.
  pool_->each(input_level_ + 1, [&](std::size_t j, std::size_t) {
    chain_.k.intt(chain_.primes[j], coef_.data() + j * n(), c1_.data() + j * n());
  });
}

template <class W>
void Engine<W>::times_p(std::size_t level) {
  each_block(level + 1, [&](std::size_t j, Block block, std::size_t) {
    W* at = c0_.data() + j * n() + block.first;
    chain_.k.scale({chain_.primes[j], block.count}, at, at, chain_.value[chain_.special()][j]);
  });
}

template <class W>
void Engine<W>::run(const Keys<W>& keys, std::size_t threads) {
  if (!chain_only_) {
    pool(keys, threads);
    run_graph(keys);
    return;
  }
  begin(keys, threads);
  times_p(input_level_);
  run_from(0, keys);
}

template <class W>
void Engine<W>::run_from(std::size_t first, const Keys<W>& keys) {
  for (std::size_t i = first; i < steps_.size(); ++i) {
    if (!steps_[i].map) {
      run_square(steps_[i].level, keys);
      continue;
    }
    const bool last = i + 1 == steps_.size(), next_square = !last && !steps_[i + 1].map;
    decompose(steps_[i].map->level, i == 0 ? c1_.data() : nullptr);
    run_map(steps_[i], keys, last, next_square);
    if (!last && !next_square) times_p(steps_[i].map->level - 1);
  }
}

template <class W>
void Engine<W>::decompose(std::size_t level, const W* own) {
  const std::size_t digits = level + 1, rows = level + 2;
  pool_->each(rows * digits, [&](std::size_t item, std::size_t) {
    const std::size_t row = item / digits, i = item % digits, j = prime_of(row, level);
    const W* at = coef_.data() + i * n();
    if (row == i && own != nullptr) {
      rows_[row * max_rows_ + i] = own + i * n();
      return;
    }
    W* out = digit(row, i);
    if (row == i) {
      chain_.k.ntt(chain_.primes[j], out, at);
    } else {
      chain_.lift(j, out, at, i);
      chain_.k.ntt(chain_.primes[j], out, out);
    }
    rows_[row * max_rows_ + i] = out;
  });
}

template <class W>
void Engine<W>::switch_row(const Key<W>& key, std::size_t level, std::size_t row, Block block, W* out0,
                           W* out1) const {
  const std::size_t key_row = row <= level ? row : key.level + 1;
  const Part<W> part(chain_.primes[prime_of(row, level)], block.count);
  const W* digits[kMaxTerms];
  const W* half0[kMaxTerms];
  const W* half1[kMaxTerms];
  for (std::size_t at = 0; at <= level; at += kMaxTerms) {
    const std::size_t count = std::min(kMaxTerms, level + 1 - at);
    for (std::size_t i = 0; i < count; ++i) {
      digits[i] = rows_[row * max_rows_ + at + i] + block.first;
      half0[i] = key.at(key_row, at + i, 0, n()) + block.first;
      half1[i] = key.at(key_row, at + i, 1, n()) + block.first;
    }
    chain_.k.dot_key(part, out0, out1, digits, half0, half1, count, at > 0);
  }
}

template <class W>
void Engine<W>::run_square(std::size_t level, const Keys<W>& keys) {
  square_sums(level, keys);
  mod_down_rescale(level,
                   {{sum(0, 0), c0_.data(), Form::kTimesP}, {sum(0, 1), coef_.data(), Form::kCoefficient}});
}

/// The square of (c0_, c1_), relinearised, modulo Q P in the first pair of sums.
template <class W>
void Engine<W>::square_sums(std::size_t level, const Keys<W>& keys) {
  // d2 goes where c1 was wanted in coefficient form; its NTT stays in work_.
  pool_->each(level + 1, [&](std::size_t j, std::size_t) {
    W *c0 = c0_.data() + j * n(), *c1 = c1_.data() + j * n(), *d2 = work_.data() + j * n();
    W *d0 = sum(1, 0) + j * n(), *d1 = sum(1, 1) + j * n();
    chain_.k.square(chain_.primes[j], d0, d1, d2, c0, c1);
    chain_.k.intt(chain_.primes[j], coef_.data() + j * n(), d2);
  });
  relinearise(level, keys);
}

/// (d0, d1) in the second pair of sums and d2, in work_ and coef_: the first pair of sums, modulo Q P.
template <class W>
void Engine<W>::relinearise(std::size_t level, const Keys<W>& keys) {
  const Key<W>& relin = keys.at(0);
  decompose(level, work_.data());
  each_block(level + 2, [&](std::size_t row, Block block, std::size_t) {
    const std::size_t j = prime_of(row, level), at = row * n() + block.first;
    const Part<W> part(chain_.primes[j], block.count);
    W *out0 = sum(0, 0) + at, *out1 = sum(0, 1) + at;
    switch_row(relin, level, row, block, out0, out1);
    if (row <= level) {
      const W p = chain_.value[chain_.special()][j];
      chain_.k.scale_add(part, out0, sum(1, 0) + at, p);
      chain_.k.scale_add(part, out1, sum(1, 1) + at, p);
    }
  });
}

template class Engine<u32>;
template class Engine<u64>;

}  // namespace blindtail
