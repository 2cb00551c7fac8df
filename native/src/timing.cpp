#include "timing.hpp"

#include <chrono>
#include <stdexcept>

namespace blindtail {

namespace {

/// One limb's operations are over in microseconds: so many of them make one run.
constexpr std::size_t kLimbBatch = 16;

class Uniform {
 public:
  template <class W>
  void fill(W* out, std::size_t n, W q) {
    for (std::size_t i = 0; i < n; ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      out[i] = static_cast<W>((state_ >> 3) % q);
    }
  }

 private:
  u64 state_ = 1;
};

template <class Body>
std::vector<double> seconds(std::size_t times, std::size_t batch, const Body& body) {
  std::vector<double> found;
  for (std::size_t i = 0; i < times; ++i) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    found.push_back(took.count() / static_cast<double>(batch));
  }
  return found;
}

}  // namespace

template <class W>
EngineTimer<W>::EngineTimer(int log_n, std::span<const u64> primes, const char* instructions,
                            std::size_t rotations)
    : level_(primes.size() - 2), engine_(log_n, primes, instructions) {
  if (primes.size() < 3 || primes.size() % 2 == 0 || rotations < 1)
    throw std::invalid_argument("an even number of data primes and at least one rotation");
  // Any plan that uses every level: maps with squares between them, zeros for weights.
  u32 element = 1;
  const u32 mask = static_cast<u32>(2 * n() - 1);
  for (std::size_t i = 0; i < rotations; ++i) elements_.push_back(element = element * 3 & mask);
  for (std::size_t level = level_;; level -= 2) {
    MapStep<W> map;
    map.level = level;
    map.babies = level == level_ ? elements_ : std::vector<u32>{1};
    map.giants = {{{0, 0}}};
    map.diagonals = 1;
    map.plain = Buffer<W>((level + 2) * n());
    map.bias = Buffer<W>(level * n());
    engine_.add_map(std::move(map));
    if (level == 1) break;
    engine_.add_square(level - 1);
  }
  engine_.finish();
  Uniform uniform;
  std::vector<u32> wanted = elements_;
  wanted.push_back(0);
  for (u32 one : wanted) {
    Key<W> key{level_, nullptr};
    Buffer<W> words(key.limbs() * n());
    key.words = words.data();
    for (std::size_t row = 0; row < level_ + 2; ++row)
      for (std::size_t digit = 0; digit <= level_; ++digit)
        for (std::size_t half = 0; half < 2; ++half)
          uniform.fill(const_cast<W*>(key.at(row, digit, half, n())), n(),
                       engine_.chain_.mod(engine_.prime_of(row, level_)).q);
    keys_.emplace(one, key);
    key_words_.push_back(std::move(words));
  }
  out_ = Buffer<W>(2 * (level_ + 1) * n());
  turned_ = Buffer<W>(2 * (level_ + 2) * n());
  const auto inputs = [&] {
    for (std::size_t half = 0; half < 2; ++half)
      for (std::size_t j = 0; j <= level_; ++j)
        uniform.fill(engine_.input(half, j), n(), engine_.chain_.mod(j).q);
  };
  inputs();
  engine_.run(keys_, 1);  // what a run allocates is there from now on
  inputs();
}

/// c1 to coefficients, then its digits modulo every prime.
template <class W>
void EngineTimer<W>::decompose() {
  const Chain<W>& chain = engine_.chain_;
  for (std::size_t j = 0; j <= level_; ++j)
    chain.k.intt(chain.primes[j], engine_.coef_.data() + j * n(), engine_.input(1, j));
  engine_.decompose(level_, engine_.input(1, 0));
}

template <class W>
void EngineTimer<W>::divide() {
  for (std::size_t half = 0; half < 2; ++half)
    engine_.mod_down(engine_.sum(0, half), level_, out_.data() + half * (level_ + 1) * n(),
                     Engine<W>::Form::kNtt);
}

template <class W>
void EngineTimer<W>::rotation(u32 element) {
  const Chain<W>& chain = engine_.chain_;
  decompose();
  for (std::size_t row = 0; row < level_ + 2; ++row)
    engine_.switch_row(keys_.at(element), level_, row, engine_.sum(0, 0) + row * n(),
                       engine_.sum(0, 1) + row * n());
  divide();
  const Automorphism& turn = engine_.automorphism(element);
  for (std::size_t j = 0; j <= level_; ++j) {
    W *c0 = out_.data() + j * n(), *c1 = out_.data() + (level_ + 1 + j) * n();
    chain.k.add(chain.primes[j], c0, c0, engine_.input(0, j));
    chain.k.permute(turn, turned_.data() + j * n(), c0, n());
    chain.k.permute(turn, turned_.data() + (level_ + 1 + j) * n(), c1, n());
  }
}

/// As a map's baby steps: prime by prime, every rotation; c0 joins times P.
template <class W>
void EngineTimer<W>::hoisted() {
  const Chain<W>& chain = engine_.chain_;
  W *t0 = engine_.scratch(0, 0), *t1 = engine_.scratch(0, 1), *lifted = engine_.scratch(0, 2);
  for (std::size_t row = 0; row < level_ + 2; ++row) {
    const std::size_t j = engine_.prime_of(row, level_);
    const bool special = row > level_;
    if (!special)
      chain.k.scale(chain.primes[j], lifted, engine_.input(0, j), chain.value[chain.special()][j]);
    for (u32 element : elements_) {
      engine_.switch_row(keys_.at(element), level_, row, t0, t1);
      if (!special) chain.k.add(chain.primes[j], t0, t0, lifted);
      const Automorphism& turn = engine_.automorphism(element);
      chain.k.permute(turn, turned_.data() + row * n(), t0, n());
      chain.k.permute(turn, turned_.data() + (level_ + 2 + row) * n(), t1, n());
    }
  }
}

template <class W>
std::vector<double> EngineTimer<W>::run(const std::string& part, std::size_t times) {
  const Chain<W>& chain = engine_.chain_;
  W* limb = turned_.data();
  const auto limbs = [&](const auto& body) {
    return seconds(times, kLimbBatch, [&] {
      for (std::size_t i = 0; i < kLimbBatch; ++i) body(engine_.input(i % 2, 0));
    });
  };
  if (part == "ntt") return limbs([&](const W* in) { chain.k.ntt(chain.primes[0], limb, in); });
  if (part == "inverse") return limbs([&](const W* in) { chain.k.intt(chain.primes[0], limb, in); });
  if (part == "automorphism") {
    const Automorphism& turn = engine_.automorphism(elements_[0]);
    return limbs([&](const W* in) { chain.k.permute(turn, limb, in, n()); });
  }
  std::size_t at = 0;
  if (part == "rotation") return seconds(times, 1, [&] { rotation(elements_[at++ % elements_.size()]); });
  if (part == "hoisted") {
    decompose();
    return seconds(times, elements_.size(), [&] { hoisted(); });
  }
  if (part == "shared") {
    return seconds(times, elements_.size(), [&] {
      decompose();
      hoisted();
      divide();
    });
  }
  if (part == "square") return seconds(times, 1, [&] { engine_.run_square(level_, keys_); });
  throw std::invalid_argument("no such part");
}

template class EngineTimer<u32>;
template class EngineTimer<u64>;

}  // namespace blindtail
