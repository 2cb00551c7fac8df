#include "timing.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

#include "body.hpp"

namespace blindtail {

namespace {

/// One limb's operations are over in microseconds: so many of them make one run.
constexpr std::size_t kLimbBatch = 16;
/// Of the replies of all compiled tails.
constexpr std::size_t kReplyPeriod = 16;

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
Pages<W>::Pages(std::size_t count) : count_(count) {
  void* found =
      ::mmap(nullptr, count * sizeof(W), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_NOHUGEPAGE
  ::madvise(found, count * sizeof(W), MADV_NOHUGEPAGE);
#endif
  data_ = static_cast<W*>(found);
}

template <class W>
Pages<W>::~Pages() {
  if (data_ != nullptr) ::munmap(data_, count_ * sizeof(W));
}

template <class W>
EngineTimer<W>::EngineTimer(int log_n, std::span<const u64> primes, const char* instructions,
                            std::size_t rotations, std::size_t threads)
    : level_(primes.size() - 2), primes_(primes.begin(), primes.end()), engine_(log_n, primes, instructions) {
  if (primes.size() < 3 || primes.size() % 2 == 0 || rotations < 1)
    throw std::invalid_argument("an even number of data primes and at least one rotation");
  if (threads < 1) throw std::invalid_argument("at least one thread");
  // Any plan that uses every level: maps with squares between them, zeros for weights.
  u32 element = 1;
  const u32 mask = static_cast<u32>(2 * n() - 1);
  for (std::size_t i = 0; i < rotations; ++i) elements_.push_back(element = element * 3 & mask);
  zeros_ = Buffer<W>((level_ + 2) * n());
  const std::span<const W> zeros(zeros_.data(), zeros_.size());
  for (std::size_t level = level_;; level -= 2) {
    MapStep<W> map;
    map.level = level;
    map.babies = level == level_ ? elements_ : std::vector<u32>{1};
    map.giants = {{{0, 0}}};
    map.diagonals = 1;
    map.plain = zeros.first((level + 2) * n());
    map.bias = zeros.first(level * n());
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
  engine_.run(keys_, threads);  // what a run allocates is there from now on
  inputs();
  std::vector<const W*> rows;
  for (std::size_t j = 0; j <= level_; ++j) rows.push_back(engine_.input(0, j));
  const std::uint8_t seed[kSeedBytes] = {};
  body_ = write_seeded<W>(primes.first(rows.size()), n(), seed, rows.data());
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
  const auto form = Engine<W>::Form::kNtt;
  engine_.mod_down(level_, {{engine_.sum(0, 0), out_.data(), form},
                            {engine_.sum(0, 1), out_.data() + (level_ + 1) * n(), form}});
}

template <class W>
void EngineTimer<W>::rotation(u32 element) {
  const Chain<W>& chain = engine_.chain_;
  decompose();
  for (std::size_t row = 0; row < level_ + 2; ++row)
    engine_.switch_row(keys_.at(element), level_, row, {0, n()}, engine_.sum(0, 0) + row * n(),
                       engine_.sum(0, 1) + row * n());
  divide();
  const Automorphism& turn = engine_.automorphism(element);
  for (std::size_t j = 0; j <= level_; ++j) {
    W *c0 = out_.data() + j * n(), *c1 = out_.data() + (level_ + 1 + j) * n();
    chain.k.add(chain.primes[j], c0, c0, engine_.input(0, j));
    chain.k.permute(turn, 0, n(), turned_.data() + j * n(), c0);
    chain.k.permute(turn, 0, n(), turned_.data() + (level_ + 1 + j) * n(), c1);
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
      engine_.switch_row(keys_.at(element), level_, row, {0, n()}, t0, t1);
      if (!special) chain.k.add(chain.primes[j], t0, t0, lifted);
      const Automorphism& turn = engine_.automorphism(element);
      chain.k.permute(turn, 0, n(), turned_.data() + row * n(), t0);
      chain.k.permute(turn, 0, n(), turned_.data() + (level_ + 2 + row) * n(), t1);
    }
  }
}

/// As a map's products with diagonals, whose plaintexts follow each other in memory prime by prime.
template <class W>
void EngineTimer<W>::products(const W* plain, std::size_t diagonals) {
  const Chain<W>& chain = engine_.chain_;
  engine_.pool_->each(level_ + 2, [&](std::size_t row, std::size_t thread) {
    W *out0 = engine_.sum(0, 0) + row * n(), *out1 = engine_.sum(0, 1) + row * n();
    const W *in0[kMaxTerms], *in1[kMaxTerms], *by[kMaxTerms];
    for (std::size_t from = 0; from < diagonals; from += kMaxTerms) {
      const std::size_t count = std::min(kMaxTerms, diagonals - from);
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t at = Engine<W>::kTemporaries + 2 * ((from + i) % elements_.size());
        in0[i] = engine_.scratch(thread, at);
        in1[i] = engine_.scratch(thread, at + 1);
        by[i] = plain + (row * diagonals + from + i) * n();
      }
      chain.k.dot_plain(chain.primes[engine_.prime_of(row, level_)], out0, out1, in0, in1, by, count,
                        from > 0);
    }
  });
}

/// So many words at least, copies of a key.
template <class W>
void EngineTimer<W>::reserve(std::size_t words) {
  if (held_.size() >= words) return;
  const Buffer<W>& key = key_words_.front();
  held_ = Pages<W>(words);
  for (std::size_t at = 0; at < words; at += key.size())
    std::memcpy(held_.data() + at, key.data(), std::min(key.size(), words - at) * sizeof(W));
}

template <class W>
void EngineTimer<W>::open() {
  std::vector<W*> rows;
  for (std::size_t j = 0; j <= level_; ++j) rows.push_back(engine_.input(0, j));
  std::uint8_t seed[kSeedBytes];
  parse_seeded<W>(body_, std::span(primes_).first(rows.size()), n(), seed, rows.data());
  write_reply<W>({primes_[0], n(), kReplyPeriod, 0}, rows[0], engine_.input(1, 0));
}

template <class W>
void EngineTimer<W>::expand() {
  std::vector<W*> rows;
  for (std::size_t j = 0; j <= level_; ++j) rows.push_back(engine_.input(1, j));
  const std::uint8_t seed[kSeedBytes] = {};
  expand_seed<W>(seed, std::span(primes_).first(rows.size()), n(), rows.data());
}

/// As where c0 joins a map's sums.
template <class W>
void EngineTimer<W>::copies() {
  const Chain<W>& chain = engine_.chain_;
  engine_.pool_->each(level_ + 1, [&](std::size_t j, std::size_t) {
    W *out = turned_.data() + j * n(), *in = engine_.input(0, j);
    chain.k.scale(chain.primes[j], out, in, chain.value[chain.special()][j]);
    chain.k.add(chain.primes[j], out, out, engine_.input(1, j));
  });
}

template <class W>
std::vector<typename EngineTimer<W>::Stages> EngineTimer<W>::stages(std::size_t bytes, std::size_t rotations,
                                                                    std::size_t diagonals,
                                                                    std::size_t times) {
  if (rotations < 1 || rotations > elements_.size() || diagonals < 1)
    throw std::invalid_argument("some rotations, no more than there are keys, and some diagonals");
  MapStep<W> map, low;  // folds are one level below
  map.level = level_ + 1;
  low.level = 1;
  low.folds = map.folds = {{elements_.begin(), elements_.begin() + static_cast<std::ptrdiff_t>(rotations)}};
  Keys<W> keys = keys_, low_keys;
  const std::size_t key_words = key_words_.front().size(), low_words = 4 * n();
  const std::size_t plain_words = diagonals * (level_ + 2) * n(), held = bytes / sizeof(W);
  reserve(held + std::max(key_words, plain_words));
  std::size_t at = 0;
  const auto next = [&](std::size_t words) {
    if (at >= held) at = 0;
    at += words;
    return held_.data() + at - words;
  };
  const auto took = [](const auto& body) { return seconds(1, 1, body).front(); };
  std::vector<Stages> found;
  for (std::size_t i = 0; i < times; ++i) {
    for (u32 element : map.folds[0]) {
      keys[element] = {level_, next(key_words)};
      low_keys[element] = {0, next(low_words)};
    }
    const W* plain = next(plain_words);
    Stages made;
    made.open = took([&] { open(); });
    made.expand = took([&] { expand(); });
    made.decompose = took([&] { decompose(); });
    made.rotations = took([&] { engine_.fold(map, keys, 0); });
    engine_.decompose(0, nullptr);
    made.low = took([&] { engine_.fold(low, low_keys, 0); });
    made.copies = took([&] { copies(); });
    made.products = took([&] { products(plain, diagonals); });
    made.divide = took([&] {
      engine_.mod_down_rescale(level_, {{engine_.sum(0, 0), out_.data(), Engine<W>::Form::kNtt},
                                        {engine_.sum(0, 1), turned_.data(), Engine<W>::Form::kCoefficient}});
    });
    found.push_back(made);
  }
  return found;
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
    return limbs([&](const W* in) { chain.k.permute(turn, 0, n(), limb, in); });
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

template class Pages<u32>;
template class Pages<u64>;
template class EngineTimer<u32>;
template class EngineTimer<u64>;

}  // namespace blindtail
