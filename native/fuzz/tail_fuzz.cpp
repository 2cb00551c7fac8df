// Keys and activations of peers, through small tails of every word size and instruction set: what is accepted
// is what the format says, all of them answer alike, and with a ticket as without.
//
// Input: byte 0 chooses what the body is (see below); if its bit 2 is set an activation is two ciphertexts,
// for a tail that reads two and makes two; if its bit 7 is set the body is cut or filled with zeros to the
// length that is wanted. Byte 1: a key's level, byte 2: its Galois element, byte 3: the tail
// that is compared with the first. The body follows. Shapes come from a program in real life, so here they
// are always valid.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "body.hpp"
#include "tail.hpp"

using namespace blindtail;

namespace {

constexpr std::size_t kHead = 4;
constexpr int kLogN = 5;
constexpr std::size_t kN = std::size_t{1} << kLogN, kInputLevel = 3;
const std::vector<u64> kPrimes{12289, 13121, 13249, 13313, 15937};  // 1 mod 2N; the special one last
const ReplyShape kReply{kPrimes[0], kN, 8, 3};
// Of the program in `make_program`.
const std::vector<KeyShape> kKeys{{0, 2}, {3, 3}, {9, 3}, {5, 2}, {25, 1}, {63, 0}};

void require(bool holds) {
  if (!holds) std::abort();
}

/// A body in a heap block of its exact size, so that AddressSanitizer sees one byte too many.
struct Block {
  std::unique_ptr<std::uint8_t[]> data;
  std::size_t size;
  Block(Bytes from, bool fit, std::size_t wanted)
      : data(new std::uint8_t[fit ? wanted : from.size()]()), size(fit ? wanted : from.size()) {
    std::copy_n(from.begin(), std::min(size, from.size()), data.get());
  }
  Bytes bytes() const { return {data.get(), size}; }
};

/// Residue `i` of a row that starts at byte `at`, bit by bit.
u64 residue(Bytes bytes, std::size_t at, std::size_t i, int width) {
  u64 value = 0;
  for (int b = 0; b < width; ++b) {
    const std::size_t bit = i * static_cast<std::size_t>(width) + static_cast<std::size_t>(b);
    value |= (u64{bytes[at + bit / 8]} >> bit % 8 & 1) << b;
  }
  return value;
}

constexpr int kWidth = 14;  // of every prime here
constexpr std::size_t kRow = kN * kWidth / 8;

/// By the format alone. Rows have no padding bits.
bool canonical(Bytes body, const std::vector<u64>& primes, std::size_t times) {
  const std::size_t size = kSeedBytes + primes.size() * kRow;
  if (body.size() != size * times) return false;
  for (std::size_t t = 0; t < times; ++t)
    for (std::size_t j = 0; j < primes.size(); ++j)
      for (std::size_t i = 0; i < kN; ++i)
        if (residue(body, t * size + kSeedBytes + j * kRow, i, kWidth) >= primes[j]) return false;
  return true;
}

/// Words that only look random.
class Noise {
 public:
  u64 operator()() { return state_ = state_ * 6364136223846793005u + 1442695040888963407u, state_ >> 33; }

 private:
  u64 state_ = 1;
};

std::vector<std::uint8_t> seeded_body(const std::vector<u64>& primes, Noise& noise) {
  std::vector<std::vector<u32>> words(primes.size(), std::vector<u32>(kN));
  std::vector<const u32*> rows;
  for (std::size_t j = 0; j < primes.size(); ++j) {
    for (u32& word : words[j]) word = static_cast<u32>(noise() % primes[j]);
    rows.push_back(words[j].data());
  }
  std::uint8_t seed[kSeedBytes];
  for (auto& byte : seed) byte = static_cast<std::uint8_t>(noise());
  return write_seeded<u32>(primes, kN, seed, rows.data());
}

/// A map with baby and giant steps and folds, a square, a map with two groups of folds.
void make_program(Tail& tail) {
  Noise noise;
  std::vector<double> slots(4 * kN / 2), bias(kN / 2);
  for (double& x : slots) x = static_cast<double>(noise() % 2001) / 1000 - 1;
  for (double& x : bias) x = static_cast<double>(noise() % 2001) / 1000 - 1;
  tail.add_map({3, {1, 3}, {{{0, 0}, {1, 1}}, {{0, 2}, {1, 3}}}, 9, {{5}}, slots, 1000, bias, 500});
  tail.add_square(2);
  slots.resize(2 * kN / 2);
  tail.add_map({1, {1, 25}, {{{0, 0}, {1, 1}}}, 1, {{63}, {63}}, slots, 1000, bias, 500});
  tail.finish(kReply.period, kReply.dropped);
}

/// Of two inputs: a group of two maps of both, a product, a group of two maps that are the outputs.
void make_wide_program(Tail& tail) {
  Noise noise;
  std::vector<double> slots(3 * kN / 2), bias(kN / 2);
  for (double& x : slots) x = static_cast<double>(noise() % 2001) / 1000 - 1;
  for (double& x : bias) x = static_cast<double>(noise() % 2001) / 1000 - 1;
  const std::span<const double> two(slots.data(), 2 * kN / 2);
  using Giants = std::vector<std::vector<std::pair<std::size_t, std::size_t>>>;
  const Giants all{{{0, 0}, {1, 1}, {2, 2}}}, steps{{{0, 0}}, {{1, 1}}};
  tail.add_map({3, {1, 3, 3}, all, 1, {{5}}, slots, 1000, bias, 500, {}, {0, 0, 1}, {0, 1}});
  tail.add_map({3, {3, 1}, steps, 9, {}, two, 1000, bias, 500, {}, {0, 1}, {0, 1}});
  tail.add_product(2, {2, 3});
  tail.add_map({1, {1, 25}, steps, 25, {{63}, {63}}, two, 1000, bias, 500, {}, {}, {4}});
  tail.add_map({1, {25}, {{{0, 0}, {0, 1}}}, 1, {{63}}, two, 1000, bias, 500, {}, {}, {4}});
  tail.finish(kReply.period, kReply.dropped, 2);
}

/// Tails with keys of their own, the second for two ciphertexts.
struct Subject {
  std::unique_ptr<Tail> tail, wide;
  std::vector<Buffer<std::uint8_t>> memory;
  std::unique_ptr<Tail::LoadedKeys> keys;
  std::unique_ptr<Tail::Ticket> ticket, wide_ticket;  // of seeds of 0x5a

  Subject(const char* instructions, int word_bits)
      : tail(make_tail(kLogN, kPrimes, instructions, word_bits)),
        wide(make_tail(kLogN, kPrimes, instructions, word_bits, 2)) {
    make_program(*tail);
    make_wide_program(*wide);
    Noise noise;
    for (const KeyShape& shape : kKeys) {
      std::vector<std::uint8_t> body;
      for (std::size_t digit = 0; digit <= shape.level; ++digit) {
        const auto part = seeded_body(level_primes(kPrimes, shape.level), noise);
        body.insert(body.end(), part.begin(), part.end());
      }
      memory.push_back(prepared(shape, body));
    }
    keys = loaded(memory);
    const std::vector<std::uint8_t> seeds(2 * kSeedBytes, 0x5a);
    ticket = tail->make_ticket(*keys, Bytes(seeds).first(kSeedBytes), 1);
    wide_ticket = wide->make_ticket(*keys, seeds, 1);
  }

  Buffer<std::uint8_t> prepared(KeyShape shape, Bytes body) const {
    Buffer<std::uint8_t> out(tail->key_bytes(shape.level));
    tail->prepare_key(shape, body, {out.data(), out.size()});
    return out;
  }

  std::unique_ptr<Tail::LoadedKeys> loaded(const std::vector<Buffer<std::uint8_t>>& of) const {
    std::vector<StoredKey> stored;
    for (std::size_t i = 0; i < of.size(); ++i) stored.push_back({kKeys[i], {of[i].data(), of[i].size()}});
    return tail->load_keys(stored);
  }
};

const std::vector<Subject>& subjects() {
  static const auto found = [] {
    std::vector<Subject> list;
    for (const int word_bits : {32, 64})
      for (const char* name : {"portable", "avx2", "avx512"}) {
        try {
          list.emplace_back(name, word_bits);
        } catch (const std::invalid_argument&) {
          require(name != std::string("portable"));
        }
      }
    return list;
  }();
  return found;
}

/// The portable tail of 32-bit words, and the other that the input names.
std::array<const Subject*, 2> pair(const std::uint8_t* head) {
  return {&subjects()[0], &subjects()[1 + head[3] % (subjects().size() - 1)]};
}

/// Nothing if the bytes were refused; any other exception than BodyError is a fault.
template <class Make>
auto accepted(Make make) -> std::optional<decltype(make())> {
  try {
    return make();
  } catch (const BodyError&) {
    return std::nullopt;
  }
}

/// The words of a prepared key as residues, no longer in Montgomery form.
template <class W>
std::vector<u64> residues(const Buffer<std::uint8_t>& made, const std::vector<u64>& primes) {
  const auto* words = reinterpret_cast<const W*>(made.data());
  const std::size_t count = made.size() / sizeof(W) / primes.size();
  std::vector<u64> out;
  for (const u64 prime : primes) {
    const Modulus<W> mod(static_cast<W>(prime));
    for (std::size_t i = 0; i < count; ++i) {
      require(*words < prime);
      out.push_back(mod.from_montgomery(*words++));
    }
  }
  return out;
}

/// A key of any level and element.
void key(const std::uint8_t* head, Bytes body, bool fit) {
  const KeyShape shape{head[2] % 33 == 0 ? 0 : head[2] % 33 * 2u - 1, head[1] % (kInputLevel + 1)};
  const std::vector<u64> primes = level_primes(kPrimes, shape.level);
  const std::size_t digits = shape.level + 1, size = seeded_bytes(primes, kN);
  const Block block(body, fit, digits * size);
  const bool good = canonical(block.bytes(), primes, digits);
  std::vector<u64> first;
  for (const Subject* one : pair(head)) {
    const auto made = accepted([&] { return one->prepared(shape, block.bytes()); });
    require(made.has_value() == good);
    if (!good) continue;
    const auto now =
        one->tail->word_bits() == 32 ? residues<u32>(*made, primes) : residues<u64>(*made, primes);
    if (first.empty()) first = now;
    require(now == first);
  }
  if (!good || shape.element > 1) return;
  // No automorphism: the first halves are what the body says.
  for (std::size_t row = 0; row < primes.size(); ++row)
    for (std::size_t digit = 0; digit < digits; ++digit)
      for (std::size_t i = 0; i < kN; ++i)
        require(first[(row * digits + digit) * 2 * kN + i] ==
                residue(block.bytes(), digit * size + kSeedBytes + row * kRow, i, kWidth));
}

void check_reply(const std::vector<std::uint8_t>& reply, std::size_t outputs = 1) {
  std::vector<u32> c0(kN), c1(kN);
  require(reply.size() == outputs * kReply.bytes());
  for (std::size_t k = 0; k < outputs; ++k) {
    const Bytes part = Bytes(reply).subspan(k * kReply.bytes(), kReply.bytes());
    parse_reply<u32>(kReply, part, nullptr, c0.data(), c1.data());
    for (std::size_t i = 0; i < kN; ++i) require(c0[i] < kReply.q0 && c1[i] < kReply.q0);
  }
}

const std::vector<u64> kInputPrimes(kPrimes.begin(), kPrimes.end() - 1);

Tail& of(const Subject& one, bool wide) { return wide ? *one.wide : *one.tail; }

/// An activation: the same reply from both.
void activation(const std::uint8_t* head, Bytes body, bool fit, bool wide) {
  const std::size_t count = wide ? 2 : 1;
  const Block block(body, fit, count * seeded_bytes(kInputPrimes, kN));
  const bool good = canonical(block.bytes(), kInputPrimes, count);
  std::optional<std::vector<std::uint8_t>> first;
  for (const Subject* one : pair(head)) {
    const auto reply = accepted([&] { return of(*one, wide).evaluate(*one->keys, block.bytes(), 1); });
    require(reply.has_value() == good);
    if (!good) continue;
    if (!first) check_reply(*reply, count), first = reply;
    require(*reply == *first);
  }
}

/// An activation and a ticket, of its own seeds or of another request.
void with_ticket(const std::uint8_t* head, Bytes body, bool fit, bool wide) {
  const std::size_t count = wide ? 2 : 1, size = seeded_bytes(kInputPrimes, kN);
  const Block block(body, fit, count * size);
  const bool good = canonical(block.bytes(), kInputPrimes, count);
  const Subject& one = subjects()[head[3] % subjects().size()];
  Tail& tail = of(one, wide);
  bool of_another = false;
  const auto other = accepted([&]() -> std::vector<std::uint8_t> {
    try {
      return tail.evaluate(*one.keys, block.bytes(), 1, wide ? *one.wide_ticket : *one.ticket);
    } catch (const std::invalid_argument&) {
      of_another = true;
      return {};
    }
  });
  require(other.has_value() == good);
  if (!good) return;
  std::vector<std::uint8_t> seeds;
  for (std::size_t i = 0; i < count; ++i) {
    const Bytes seed = block.bytes().subspan(i * size, kSeedBytes);
    seeds.insert(seeds.end(), seed.begin(), seed.end());
  }
  require(of_another != std::all_of(seeds.begin(), seeds.end(), [](std::uint8_t b) { return b == 0x5a; }));
  const auto ticket = tail.make_ticket(*one.keys, seeds, 1);
  const auto plain = tail.evaluate(*one.keys, block.bytes(), 1);
  require(plain == tail.evaluate(*one.keys, block.bytes(), 1, *ticket));
  if (!of_another) require(plain == *other);
}

/// A body of all keys, and a run with them.
void all_keys(const std::uint8_t* head, Bytes body, bool fit) {
  std::vector<u32> levels;
  std::size_t total = 0;
  for (const KeyShape& shape : kKeys) {
    levels.push_back(static_cast<u32>(shape.level));
    total += (shape.level + 1) * seeded_bytes(level_primes(kPrimes, shape.level), kN);
  }
  const Block block(body, fit, total);
  const auto digits = accepted([&] { return split_keys(block.bytes(), levels, kPrimes, kN); });
  require(digits.has_value() == (block.size == total));
  if (!digits) return;
  Noise noise;
  const std::vector<std::uint8_t> input = seeded_body(kInputPrimes, noise);
  std::optional<std::vector<std::uint8_t>> first;
  for (const Subject* one : pair(head)) {
    std::vector<Buffer<std::uint8_t>> memory;
    std::size_t at = 0;
    for (const KeyShape& shape : kKeys) {
      const std::size_t size = (shape.level + 1) * seeded_bytes(level_primes(kPrimes, shape.level), kN);
      const Bytes part = block.bytes().subspan(at, size);
      auto made = accepted([&] { return one->prepared(shape, part); });
      require(made.has_value() == canonical(part, level_primes(kPrimes, shape.level), shape.level + 1));
      if (!made) return;
      memory.push_back(std::move(*made));
      at += size;
    }
    const auto keys = one->loaded(memory);
    const auto reply = one->tail->evaluate(*keys, input, 1);
    if (!first) check_reply(reply), first = reply;
    require(reply == *first);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < kHead) return 0;
  const Bytes body(data + kHead, size - kHead);
  const bool fit = data[0] >> 7 != 0, wide = data[0] >> 2 & 1;
  switch (data[0] % 4) {
    case 0:
      key(data, body, fit);
      break;
    case 1:
      activation(data, body, fit, wide);
      break;
    case 2:
      with_ticket(data, body, fit, wide);
      break;
    default:
      all_keys(data, body, fit);
      break;
  }
  return 0;
}
