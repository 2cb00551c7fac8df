// Encoded maps in memory of somebody else: the words of a tail that encodes for itself, and no other place.
#include <cstring>
#include <random>

#include "codec_check.hpp"
#include "tail.hpp"

using namespace blindtail;

namespace {

constexpr int kLogN = 5;
constexpr std::size_t kN = std::size_t{1} << kLogN, kSlots = kN / 2;
const std::vector<u64> kPrimes{12289, 13121, 13249, 13313, 15937};  // 1 mod 2N; the special one last
const std::vector<KeyShape> kKeys{{0, 2}, {3, 3}, {9, 3}, {5, 2}, {25, 1}, {63, 0}};

using Block = Buffer<std::uint8_t>;

/// Complex diagonals with baby and giant steps and folds at level 3; two groups of folds at level 1. A square
/// is between them.
struct Maps {
  std::vector<double> first, imaginary, last, bias;
  std::mt19937_64 random{5};

  Maps() : first(4 * kSlots), imaginary(4 * kSlots), last(2 * kSlots), bias(kSlots) {
    std::uniform_real_distribution<double> weight(-1, 1);
    for (auto* values : {&first, &imaginary, &last, &bias})
      for (double& x : *values) x = weight(random);
  }
  MapDescription upper() const {
    return {3, {1, 3}, {{{0, 0}, {1, 1}}, {{0, 2}, {1, 3}}}, 9, {{5}}, first, 1000, bias, 500, imaginary};
  }
  MapDescription lower() const {
    return {1, {1, 25}, {{{0, 0}, {1, 1}}}, 1, {{63}, {63}}, last, 1000, bias, 500};
  }
};

/// Any words will do for keys.
struct Run {
  std::vector<Block> memory;
  std::unique_ptr<Tail::LoadedKeys> keys;
  std::vector<u64> c0, c1;

  explicit Run(const Tail& tail) {
    std::mt19937_64 random(7);
    std::vector<StoredKey> stored;
    for (const KeyShape& shape : kKeys) {
      Block& block = memory.emplace_back(tail.key_bytes(shape.level));
      const std::size_t word = static_cast<std::size_t>(tail.word_bits()) / 8;
      for (std::size_t i = 0; i < block.size(); i += word) {
        const u64 value = random() % kPrimes[0];
        std::memcpy(block.data() + i, &value, word);  // little-endian, as x86-64 and ARM64 are
      }
      stored.push_back({shape, {block.data(), block.size()}});
    }
    keys = tail.load_keys(stored);
    for (std::size_t i = 0; i < 4 * kN; ++i)
      c0.push_back(random() % kPrimes[0]), c1.push_back(random() % 999);
  }
  std::vector<u64> operator()(Tail& tail) const { return tail.evaluate_residues(*keys, c0, c1, 1); }
};

std::span<std::uint8_t> bytes(Block& block) { return {block.data(), block.size()}; }

std::unique_ptr<Tail> made(const char* instructions, int word_bits) {
  return make_tail(kLogN, kPrimes, instructions, word_bits);
}

std::unique_ptr<Tail> own(const Maps& maps, const char* instructions, int word_bits) {
  auto tail = made(instructions, word_bits);
  tail->add_map(maps.upper());
  tail->add_square(2);
  tail->add_map(maps.lower());
  tail->finish(8, 3);
  return tail;
}

/// Weights are not looked at when an encoded map is added.
std::unique_ptr<Tail> placed(MapDescription upper, MapDescription lower, Block& first, Block& last,
                             const char* instructions, int word_bits) {
  auto tail = made(instructions, word_bits);
  upper.diagonals = upper.bias = lower.diagonals = lower.bias = {};
  tail->add_encoded_map(upper, bytes(first));
  tail->add_square(2);
  tail->add_encoded_map(lower, bytes(last));
  tail->finish(8, 3);
  return tail;
}

void test_same_words(int word_bits) {
  const Maps maps;
  std::vector<std::uint8_t> before;
  for (const CodecKernels* table : tables()) {
    const auto alone = own(maps, table->name, word_bits);
    const Run run(*alone);
    const std::vector<u64> want = run(*alone);
    Block first(alone->map_bytes(3, 4)), last(alone->map_bytes(1, 2));
    CHECK(alone->plain_bytes() == first.size() + last.size() && first.size() % 64 == 0);
    const auto encoder = made(table->name, word_bits);
    encoder->encode_map(maps.upper(), bytes(first));
    encoder->encode_map(maps.lower(), bytes(last));
    CHECK(encoder->plain_bytes() == 0);
    // The file is the same whoever wrote it.
    if (before.empty()) before.assign(first.data(), first.data() + first.size());
    CHECK(std::equal(before.begin(), before.end(), first.data()));

    const auto tail = placed(maps.upper(), maps.lower(), first, last, table->name, word_bits);
    CHECK(tail->plain_bytes() == alone->plain_bytes());
    CHECK(run(*tail) == want && run(*tail) == want);
    // Read in place: one bit there is another result. The first word is q_0's of the first diagonal, the
    // last one the bias's.
    for (std::uint8_t* at :
         {first.data(), last.data() + last.size() - static_cast<std::size_t>(word_bits) / 8}) {
      *at ^= 1;
      CHECK(run(*tail) != want);
      *at ^= 1;
    }
    CHECK(run(*tail) == want);
    // Imaginary parts count.
    MapDescription real = maps.upper();
    real.imaginary = {};
    encoder->encode_map(real, bytes(first));
    CHECK(run(*tail) != want);
  }
}

void test_refusals(int word_bits) {
  const Maps maps;
  const auto tail = made("portable", word_bits);
  const std::size_t size = tail->map_bytes(3, 4), diagonal = tail->map_bytes(3, 5) - size;
  Block block(size + diagonal + 64);
  const auto refused = [&](const std::function<void(std::span<std::uint8_t>)>& use) {
    for (const std::size_t wrong :
         {std::size_t{0}, size - 64, size - 1, size + 1, size + 64, size - diagonal, size + diagonal})
      CHECK(throws<std::invalid_argument>([&] { use(bytes(block).first(wrong)); }));
    for (const std::size_t shift : {1, 4, 8, 32, 63})
      CHECK(throws<std::invalid_argument>([&] { use(bytes(block).subspan(shift, size)); }));
  };
  refused([&](std::span<std::uint8_t> place) { tail->encode_map(maps.upper(), place); });
  refused([&](std::span<std::uint8_t> place) { tail->add_encoded_map(maps.upper(), place); });
  CHECK(tail->plain_bytes() == 0);
  for (const std::size_t level : {0, 4, 5}) {
    MapDescription map = maps.upper();
    map.level = level;
    CHECK(throws<std::invalid_argument>([&] { tail->map_bytes(level, 4); }));
    CHECK(throws<std::invalid_argument>([&] { tail->encode_map(map, bytes(block).first(size)); }));
    CHECK(throws<std::invalid_argument>([&] { tail->add_encoded_map(map, bytes(block).first(size)); }));
  }
  CHECK(throws<std::invalid_argument>([&] { tail->map_bytes(3, 64 * kSlots + 1); }));
  CHECK(throws<std::invalid_argument>([&] { tail->map_bytes(3, ~std::size_t{0}); }));
  for (const std::size_t count : {std::size_t{0}, kSlots + 1, 4 * kSlots - 1}) {
    MapDescription map = maps.upper();
    map.diagonals = map.diagonals.first(count);
    CHECK(throws<std::invalid_argument>([&] { tail->encode_map(map, bytes(block).first(size)); }));
    map = maps.upper();
    map.imaginary = map.imaginary.first(std::max<std::size_t>(count, 1));
    CHECK(throws<std::invalid_argument>([&] { tail->encode_map(map, bytes(block).first(size)); }));
  }
  MapDescription map = maps.upper();
  map.giants[1][1].second = ~std::size_t{0};  // a diagonal that cannot be
  CHECK(throws<std::invalid_argument>([&] { tail->add_encoded_map(map, bytes(block).first(size)); }));
  // As it should be, it is taken.
  tail->encode_map(maps.upper(), bytes(block).first(size));
  tail->add_encoded_map(maps.upper(), bytes(block).first(size));
  CHECK(tail->plain_bytes() == size);
}

}  // namespace

int main() {
  for (const int word_bits : {32, 64}) test_same_words(word_bits), test_refusals(word_bits);
  if (failures == 0) std::puts("encoded maps: all is well");
  return failures == 0 ? 0 : 1;
}
