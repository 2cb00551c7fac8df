#include "tail.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "body.hpp"
#include "seeds.hpp"

namespace blindtail {

namespace {

template <class W>
class LoadedKeysOf final : public Tail::LoadedKeys {
 public:
  Keys<W> keys;
};

template <class W>
class TicketOf final : public Tail::Ticket {
 public:
  std::size_t bytes() const override { return words.size() * sizeof(W); }

  Buffer<W> words;
  std::vector<std::uint8_t> seeds;  // of all inputs
  u64 keys = 0;
};

template <class W>
class TailOf final : public Tail {
 public:
  /// `instructions` for both tables; 64-bit words have portable kernels alone.
  TailOf(int log_n, std::span<const u64> primes, const char* instructions, std::size_t inputs)
      : primes_(primes.begin(), primes.end()),
        codec_(codec_kernels(instructions)),
        engine_(log_n, primes, kBits<W> == 32 ? instructions : nullptr, inputs),
        encoder_(log_n, codec_) {}

  void add_map(const MapDescription& map) override {
    own_.emplace_back(map_bytes(map.level, map.diagonals.size() / (n() / 2)));
    const std::span<std::uint8_t> place(own_.back().data(), own_.back().size());
    encode_map(map, place);
    add_encoded_map(map, place);
  }

  std::size_t map_bytes(std::size_t level, std::size_t diagonals) const override {
    check_level(level);
    // Each operand has no more rotations than there are slots.
    if (diagonals > kMostInputs * n() / 2)
      throw std::invalid_argument("a map has more diagonals than slots of 64 operands");
    return ((level + 2) * diagonals + level) * n() * sizeof(W);
  }

  void encode_map(const MapDescription& map, std::span<std::uint8_t> out) override {
    const std::size_t slots = n() / 2, count = map.diagonals.size() / slots;
    if (map.diagonals.size() % slots || map.bias.size() != slots ||
        (!map.imaginary.empty() && map.imaginary.size() != map.diagonals.size()))
      throw std::invalid_argument("a map's slots");
    check_place(out, map_bytes(map.level, count));
    W* const plain = reinterpret_cast<W*>(out.data());
    W* const bias = plain + (map.level + 2) * count * n();
    std::vector<W*> rows(map.level + 2);
    for (std::size_t d = 0; d < count; ++d) {
      for (std::size_t row = 0; row < rows.size(); ++row) rows[row] = plain + (row * count + d) * n();
      const double* imaginary = map.imaginary.empty() ? nullptr : map.imaginary.data() + d * slots;
      encode(map.diagonals.data() + d * slots, imaginary, map.plain_scale, map.level, true, rows);
      for (std::size_t row = 0; row < rows.size(); ++row) {
        const Prime<W>& prime = this->prime(row, map.level);
        chain().k.scale(prime, rows[row], rows[row], prime.mod.square);
      }
    }
    rows.resize(map.level);
    for (std::size_t row = 0; row < rows.size(); ++row) rows[row] = bias + row * n();
    encode(map.bias.data(), nullptr, map.bias_scale, map.level - 1, false, rows);
    if (map.level == 1) chain().k.intt(chain().primes[0], rows[0], rows[0]);  // replies are coefficients
  }

  void add_encoded_map(const MapDescription& map, std::span<const std::uint8_t> encoded) override {
    MapStep<W> step;
    step.level = map.level;
    step.babies = map.babies;
    step.inputs = map.inputs;
    step.giant = map.giant;
    step.folds = map.folds;
    for (const auto& giant : map.giants) {
      auto& terms = step.giants.emplace_back();
      for (const auto& [baby, diagonal] : giant) {
        terms.push_back({baby, diagonal});
        step.diagonals = std::max(step.diagonals, diagonal + 1);
      }
    }
    check_place(encoded, map_bytes(map.level, step.diagonals));
    const std::span<const W> words(reinterpret_cast<const W*>(encoded.data()), encoded.size() / sizeof(W));
    step.bias = words.last(map.level * n());
    step.plain = words.first(words.size() - step.bias.size());
    engine_.add_map(std::move(step), map.sources);
    plain_bytes_ += encoded.size();
  }

  void add_square(std::size_t level, std::vector<std::size_t> sources) override {
    engine_.add_square(level, std::move(sources));
  }

  void add_product(std::size_t level, std::vector<std::size_t> sources) override {
    engine_.add_product(level, std::move(sources));
  }

  void add_sum(std::size_t level, std::vector<std::size_t> sources, std::span<const double> constant,
               double scale) override {
    Buffer<W> words;
    if (!constant.empty()) {
      if (constant.size() != n() / 2 || level + 1 >= primes_.size())
        throw std::invalid_argument("a constant's slots or level");
      words = Buffer<W>((level + 1) * n());
      std::vector<W*> rows(level + 1);
      for (std::size_t row = 0; row < rows.size(); ++row) rows[row] = words.data() + row * n();
      encode(constant.data(), nullptr, scale, level, false, rows);
      plain_bytes_ += words.size() * sizeof(W);
    }
    engine_.add_sum(level, std::move(sources), std::move(words));
  }

  void finish(std::size_t period, int dropped, std::size_t outputs, std::size_t group_bytes) override {
    engine_.finish(outputs, group_bytes);
    reply_ = {primes_[0], n(), period, dropped};
    reply_.check(kBits<W>);
  }

  int word_bits() const override { return kBits<W>; }
  const char* instructions() const override { return chain().k.name; }
  std::size_t plain_bytes() const override { return plain_bytes_; }
  std::size_t inputs() const override { return engine_.inputs(); }
  std::size_t outputs() const override { return engine_.outputs(); }
  std::vector<std::size_t> groups() const override { return engine_.groups(); }

  std::size_t key_bytes(std::size_t level) const override {
    return 2 * (level + 2) * (level + 1) * n() * sizeof(W);
  }

  void prepare_key(KeyShape shape, std::span<const std::uint8_t> body,
                   std::span<std::uint8_t> out) const override {
    const std::size_t level = shape.level, rows = level + 2;
    if (level + 2 > primes_.size() || out.size() != key_bytes(level))
      throw std::invalid_argument("a key's level");
    // The sum of digits times key is turned once, at the end: the key is kept turned back.
    const u32 mask = static_cast<u32>(2 * n() - 1);
    u32 inverse = 1;  // the group of odd numbers modulo 2N has an order that divides N / 2
    if (shape.element > 1)
      for (std::size_t i = 0; i + 1 < n() / 2; ++i)
        inverse = static_cast<u32>((u64{inverse} * shape.element) & mask);
    const Automorphism back(inverse, chain().log_n);
    std::vector<u64> list;
    for (std::size_t row = 0; row < rows; ++row)
      list.push_back(primes_[row <= level ? row : primes_.size() - 1]);
    Buffer<W> words(2 * rows * n()), line(n());
    std::vector<W*> c0(rows), c1(primes_.size(), nullptr);
    for (std::size_t row = 0; row < rows; ++row) {
      c0[row] = words.data() + row * n();
      c1[row <= level ? row : primes_.size() - 1] = words.data() + (rows + row) * n();
    }
    const std::size_t size = seeded_bytes(list, n());
    if (body.size() != size * (level + 1)) throw BodyError("a key's bytes are not those of its level");
    std::size_t at = 0;
    for (std::size_t digit = 0; digit <= level; ++digit) {
      std::uint8_t seed[kSeedBytes];
      parse_seeded<W>(body.subspan(at, size), list, n(), seed, c0.data(), codec_);
      at += size;
      // The seed of a key covers all key primes, whatever its level.
      expand_seed<W>(seed, primes_, n(), c1.data(), codec_);
      for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t half = 0; half < 2; ++half) {
          const Prime<W>& prime = this->prime(row, level);
          W* from = words.data() + (half * rows + row) * n();
          chain().k.scale(prime, line.data(), from, prime.mod.square);
          if (shape.element > 1)
            chain().k.permute(back, 0, n(), from, line.data());
          else
            std::memcpy(from, line.data(), n() * sizeof(W));
          const std::size_t to = ((row * (level + 1) + digit) * 2 + half) * n() * sizeof(W);
          std::memcpy(out.data() + to, from, n() * sizeof(W));
        }
    }
  }

  std::unique_ptr<LoadedKeys> load_keys(const std::vector<StoredKey>& stored) const override {
    auto loaded = std::make_unique<LoadedKeysOf<W>>();
    for (const StoredKey& key : stored) {
      if (key.bytes.size() != key_bytes(key.shape.level) ||
          reinterpret_cast<std::uintptr_t>(key.bytes.data()) % 64)
        throw std::invalid_argument("a prepared key's size or alignment");
      loaded->keys[key.shape.element] = {key.shape.level, reinterpret_cast<const W*>(key.bytes.data())};
    }
    return loaded;
  }

  void expect() override {
    const std::unique_lock lock(mutex_, std::try_to_lock);  // somebody else's run has them awake
    if (lock) engine_.wake();
  }

  std::vector<std::uint8_t> evaluate(const LoadedKeys& keys, std::span<const std::uint8_t> body,
                                     std::size_t threads) override {
    const std::lock_guard lock(mutex_);
    const std::vector<Bytes> parts = split(body);
    const std::vector<std::uint8_t> seeds = seeds_of(parts);
    read(engine_.pool(typed(keys), threads), parts, seeds);
    engine_.run(typed(keys), threads);
    return reply();
  }

  std::unique_ptr<Ticket> make_ticket(const LoadedKeys& keys, std::span<const std::uint8_t> seed,
                                      std::size_t threads) override {
    if (seed.size() != inputs() * kSeedBytes)
      throw std::invalid_argument("a seed has 64 bytes for each ciphertext that goes in");
    const std::lock_guard lock(mutex_);
    auto made = std::make_unique<TicketOf<W>>();
    made->words = Buffer<W>(engine_.ticket_words());
    made->keys = keys.id;
    made->seeds.assign(seed.begin(), seed.end());
    read(engine_.pool(typed(keys), threads), {}, made->seeds);
    engine_.make_ticket(typed(keys), threads, made->words.data());
    return made;
  }

  std::vector<std::uint8_t> evaluate(const LoadedKeys& keys, std::span<const std::uint8_t> body,
                                     std::size_t threads, const Ticket& ticket) override {
    const auto* mine = dynamic_cast<const TicketOf<W>*>(&ticket);
    if (mine == nullptr || mine->words.size() != engine_.ticket_words() || mine->keys != keys.id)
      throw std::invalid_argument("a ticket of another tail or of other keys");
    const std::lock_guard lock(mutex_);
    const std::vector<Bytes> parts = split(body);
    read(engine_.pool(typed(keys), threads), parts, {});
    if (seeds_of(parts) != mine->seeds) throw std::invalid_argument("a ticket of another request");
    engine_.run_ticket(typed(keys), threads, mine->words.data());
    return reply();
  }

  std::vector<u64> evaluate_residues(const LoadedKeys& keys, std::span<const u64> c0, std::span<const u64> c1,
                                     std::size_t threads) override {
    const std::lock_guard lock(mutex_);
    const std::size_t words = (engine_.input_level() + 1) * n();
    if (c0.size() != inputs() * words || c1.size() != inputs() * words)
      throw std::invalid_argument("a ciphertext's size");
    for (std::size_t i = 0; i < inputs(); ++i) {
      std::copy_n(c0.begin() + static_cast<std::ptrdiff_t>(i * words), words, engine_.input(0, 0, i));
      std::copy_n(c1.begin() + static_cast<std::ptrdiff_t>(i * words), words, engine_.input(1, 0, i));
    }
    engine_.run(typed(keys), threads);
    std::vector<u64> out;
    for (std::size_t i = 0; i < outputs(); ++i)
      for (const std::size_t half : {0, 1})
        out.insert(out.end(), engine_.output(half, i), engine_.output(half, i) + n());
    return out;
  }

 private:
  std::span<const u64> input_primes() const { return {primes_.data(), engine_.input_level() + 1}; }
  /// A body by input.
  std::vector<Bytes> split(Bytes body) const { return split_seeded(body, input_primes(), n(), inputs()); }
  std::vector<std::uint8_t> seeds_of(const std::vector<Bytes>& parts) const {
    std::vector<std::uint8_t> seeds(parts.size() * kSeedBytes);
    for (std::size_t i = 0; i < parts.size(); ++i)
      parse_seed(parts[i], input_primes(), n(), seeds.data() + i * kSeedBytes);
    return seeds;
  }
  /// To where a run reads them: every input's c0 from its part of a body, unless there is none, and c1 from
  /// its seed, unless there are none.
  void read(Pool& pool, const std::vector<Bytes>& parts, Bytes seeds) {
    const std::span<const u64> primes = input_primes();
    const std::size_t count = primes.size(), rows = inputs() * count;
    rows_.clear();
    for (std::size_t row = 0; row < rows; ++row) rows_.push_back(engine_.input(1, row % count, row / count));
    std::vector<SeedStream> streams;
    std::vector<Sampling<W>> c1;
    streams.reserve(inputs());  // they stay where they are
    c1.reserve(inputs());
    for (std::size_t i = 0; i < seeds.size() / kSeedBytes; ++i) {
      streams.emplace_back(seeds.data() + i * kSeedBytes, codec_);
      c1.emplace_back(streams.back(), primes, n(), rows_.data() + i * count, codec_);
    }
    // Row by row: the same thread goes on with a row.
    const std::size_t pieces = c1.empty() ? 0 : c1.front().pieces_of_row(), items = 1 + pieces;
    std::atomic<bool> good = true;
    pool.each(rows * items, [&](std::size_t item, std::size_t) {
      const std::size_t row = item / items, piece = item % items, i = row / count, j = row % count;
      if (piece < pieces)
        c1[i].make(j, piece);
      else if (!parts.empty() && !parse_row<W>(parts[i], primes, n(), j, engine_.input(0, j, i), codec_))
        good = false;
    });
    if (!good) refuse_residues();
    for (Sampling<W>& one : c1) one.finish();
  }
  /// All outputs' bodies, one after the other.
  std::vector<std::uint8_t> reply() const {
    std::vector<std::uint8_t> out = write_reply<W>(reply_, engine_.output(0), engine_.output(1));
    for (std::size_t i = 1; i < outputs(); ++i) {
      const std::vector<std::uint8_t> more =
          write_reply<W>(reply_, engine_.output(0, i), engine_.output(1, i));
      out.insert(out.end(), more.begin(), more.end());
    }
    return out;
  }
  void check_level(std::size_t level) const {
    if (level < 1 || level + 2 > primes_.size()) throw std::invalid_argument("a map's level");
  }
  static void check_place(std::span<const std::uint8_t> bytes, std::size_t wanted) {
    if (bytes.size() != wanted) throw std::invalid_argument("an encoded map's size");
    if (reinterpret_cast<std::uintptr_t>(bytes.data()) % 64)
      throw std::invalid_argument("an encoded map's alignment: it begins at a multiple of 64 bytes");
  }
  const Chain<W>& chain() const { return engine_.chain(); }
  std::size_t n() const { return chain().n; }
  const Prime<W>& prime(std::size_t row, std::size_t level) const {
    return chain().primes[row <= level ? row : chain().special()];
  }
  const Keys<W>& typed(const LoadedKeys& keys) const {
    const auto* mine = dynamic_cast<const LoadedKeysOf<W>*>(&keys);
    if (mine == nullptr) throw std::invalid_argument("keys of another word size");
    return mine->keys;
  }
  /// N / 2 slots; `imaginary` may be null.
  void encode(const double* slots, const double* imaginary, double scale, std::size_t level, bool special,
              std::vector<W*>& rows) {
    std::vector<const Prime<W>*> list;
    for (std::size_t row = 0; row < level + (special ? 2 : 1); ++row) list.push_back(&prime(row, level));
    encoder_.encode(slots, imaginary, scale, list, &chain().k, rows.data());
  }

  std::vector<u64> primes_;
  const CodecKernels& codec_;
  Engine<W> engine_;
  Encoder<W> encoder_;
  std::mutex mutex_;
  std::vector<Buffer<std::uint8_t>> own_;  // maps that were encoded here
  std::vector<W*> rows_;
  std::size_t plain_bytes_ = 0;
  ReplyShape reply_{};
};

}  // namespace

u64 Tail::LoadedKeys::next_id() {
  static std::atomic<u64> next{1};
  return next.fetch_add(1, std::memory_order_relaxed);
}

std::unique_ptr<Tail> make_tail(int log_n, std::span<const u64> primes, const char* instructions,
                                int word_bits, std::size_t inputs) {
  if (primes.empty()) throw std::invalid_argument("no primes");
  const auto [low, high] = std::minmax_element(primes.begin(), primes.end());
  const bool narrow = *high < (u64{1} << 30) && *high < 2 * *low;
  if (word_bits == 0) word_bits = narrow ? 32 : 64;
  if (word_bits == 32) return std::make_unique<TailOf<u32>>(log_n, primes, instructions, inputs);
  if (word_bits == 64) return std::make_unique<TailOf<u64>>(log_n, primes, instructions, inputs);
  throw std::invalid_argument("words have 32 or 64 bits");
}

}  // namespace blindtail
