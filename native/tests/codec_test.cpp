// Seeds and bit packing against known answers and plain definitions.
//
// Known answers: `stream` from RFC 7693 written out in Python (its root hashes also from hashlib),
// `SEAL` from relinearisation keys that SEAL 4 saved with a seed and loaded again, packed bytes from
// blindtail.he.packing.
#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bits.hpp"
#include "codec_check.hpp"
#include "seeds.hpp"

using namespace blindtail;

namespace {

// ---- seeds

void test_stream() {
  const struct {
    u64 first;
    std::size_t count;
    u64 begin, end, all;
  } known[] = {{0, 2, 0x7aa795637f76b917, 0x85c285c56f8b2c63, 0x4f38bb735a6a9ef8},
               {0xffffffff, 2, 0xf369cea3387452ac, 0xeb0419804b442984, 0xee32695da51921b3},
               {u64{1} << 40, 1, 0x5b409ec9a675951a, 0x2e5f0b4d816101de, 0xe4bc26acb366cea7}};
  std::uint8_t seed[kSeedBytes];
  for (std::size_t i = 0; i < kSeedBytes; ++i) seed[i] = static_cast<std::uint8_t>(i);
  std::vector<u64> long_run(512 * 21), reference;
  for (const CodecKernels* table : tables()) {
    SeedStream stream(seed, *table);
    for (const auto& one : known) {
      std::vector<u64> words(512 * one.count);
      stream.blocks(one.first, one.count, words.data());
      CHECK(words.front() == one.begin && words.back() == one.end);
      CHECK(hash(words.data(), words.size()) == one.all);
    }
    stream.blocks(3, 21, long_run.data());
    if (reference.empty()) reference = long_run;
    CHECK(long_run == reference);
  }
}

template <class W>
void check_seal(std::size_t n, const std::vector<u64>& primes, const std::string& seed,
                const std::vector<u64>& hashes) {
  const auto bytes = hex(seed);
  for (const CodecKernels* table : tables())
    for (u32 wanted = 1; wanted < 1u << primes.size(); ++wanted) {
      Limbs<W> out(primes.size(), n);
      for (std::size_t i = 0; i < primes.size(); ++i)
        if ((wanted >> i & 1) == 0) out.rows[i] = nullptr;
      expand_seed<W>(bytes.data(), primes, n, out.rows.data(), *table);
      for (std::size_t i = 0; i < primes.size(); ++i)
        if (wanted >> i & 1) CHECK(hash(out.words[i].data(), n) == hashes[i]);
    }
}

void test_seal() {
  // Primes of 20 and of 30 bits; then one word in 20 is redrawn, some twice; then widths mixed.
  const std::vector<u64> small{1038337, 1032193, 1017857},
      fast{1073692673, 1073643521, 1073479681, 1073430529};
  const std::string small_seed =
      "3d9a114bcb4ff0d5235fe513650453c4aab09c145faf63577a5064011dc798f1"
      "19faeda6054b90ab34fb68acd8cc6e285ea519eefb8563da39163e6e63791bbd";
  const std::string fast_seed =
      "ff7c09075770f9a35a409698eb056803895775da9a84232c613daa65d56bec36"
      "7735bf17a2d5e3c4b13f14b977c5b8eb466d62c589e9caaf2a79778ed45a8255";
  const std::vector<u64> small_hash{0x5bf6ceb03b1287e5, 0x20bebbb2bc5e1384, 0xfcdeec1e06b53c3d};
  const std::vector<u64> fast_hash{0xf35293d3fc14159a, 0x60b1665a78ac91d5, 0x812398c6f5fb4a36,
                                   0x28360f0743025e3a};
  check_seal<u32>(1024, small, small_seed, small_hash);
  check_seal<u64>(1024, small, small_seed, small_hash);
  check_seal<u32>(8192, fast, fast_seed, fast_hash);
  check_seal<u64>(8192, fast, fast_seed, fast_hash);
  check_seal<u64>(1024, {1095275429376501761, 1095275429376448513, 1095275429376434177, 1095275429376399361},
                  "5dff3f7ac1fc891dd11380e9a4c9782eea1663006653aa2680dfc59016d8e7d5"
                  "011aa428a9418c29d2b5e16e8f191671587f45a6473f91fa6bc6b2c4fbd8a1a0",
                  {0xe488851ed0c44eb0, 0xe7d28c4bd91d32bd, 0x28b7e576022aa433, 0xd3f2555e42e1ee06});
  check_seal<u64>(2048, {1152921504606830593, 1073692673, 1032193, 1125899906826241},
                  "3acf5310fc513351b0c23b06a584ccf86ee38f9f3578d6414149457975687c6e"
                  "42634dedc83e5cb938294fcf4f9022a1f35ccd2bf18d232eb1bfad5c71bd3c60",
                  {0x391126bb35a1d43d, 0xe87beb6937de6852, 0x78af4068a6976dab, 0x98d0545cfbbec9cc});
}

/// Words that a test chose; zeros after them.
class Given final : public WordStream {
 public:
  explicit Given(std::vector<u64> words) : words_(std::move(words)) {}
  void blocks(u64 first, std::size_t count, u64* out) override {
    for (std::size_t i = 0; i < 512 * count; ++i)
      out[i] = first * 512 + i < words_.size() ? words_[first * 512 + i] : 0;
  }

 private:
  std::vector<u64> words_;
};

/// The rule, word by word: redraws come after the words of all primes, in order.
std::vector<std::vector<u64>> sample_plainly(const std::vector<u64>& words, const std::vector<u64>& primes,
                                             std::size_t n) {
  std::vector<std::vector<u64>> out(primes.size(), std::vector<u64>(n));
  std::size_t next = primes.size() * n;
  for (std::size_t r = 0; r < primes.size(); ++r)
    for (std::size_t i = 0; i < n; ++i) {
      u64 word = words[r * n + i];
      while (word >= ~u64{0} - ~u64{0} % primes[r] - 1) word = words[next++];
      out[r][i] = word % primes[r];
    }
  return out;
}

template <class W>
void test_redraws(const std::vector<u64>& primes) {
  std::mt19937_64 random(primes[0]);
  for (const std::size_t n : {32, 96, 512, 1024, 8192})
    for (const unsigned rate : {2, 100, 5000}) {
      std::vector<u64> words(primes.size() * n * 3);
      for (u64& word : words) {
        const u64 bound = rejection_bound(primes[random() % primes.size()]);
        word = random() % rate == 0 ? bound - 2 + random() % 5 : random() >> 1;  // at the bound and about it
      }
      const auto expected = sample_plainly(words, primes, n);
      Given stream(words);
      for (const CodecKernels* table : tables())
        for (u32 wanted = 1; wanted < 1u << primes.size(); ++wanted) {
          Limbs<W> out(primes.size(), n);
          for (std::size_t i = 0; i < primes.size(); ++i)
            if ((wanted >> i & 1) == 0) out.rows[i] = nullptr;
          sample_uniform<W>(stream, primes, n, out.rows.data(), *table);
          for (std::size_t i = 0; i < primes.size(); ++i)
            if (wanted >> i & 1)
              CHECK(std::equal(out.words[i].begin(), out.words[i].end(), expected[i].begin()));
        }
      // Piece by piece by two threads, each from its own end.
      Limbs<W> out(primes.size(), n);
      Sampling<W> sampling(stream, primes, n, out.rows.data());
      const std::size_t pieces = sampling.pieces_of_row(), count = primes.size() * pieces;
      CHECK(n < 8192 || pieces > 1);
      const auto make = [&](std::size_t i) { sampling.make(i / pieces, i % pieces); };
      std::thread other([&] {
        for (std::size_t i = count; i-- > count / 2;) make(i);
      });
      for (std::size_t i = 0; i < count / 2; ++i) make(i);
      other.join();
      sampling.finish();
      for (std::size_t i = 0; i < primes.size(); ++i)
        CHECK(std::equal(out.words[i].begin(), out.words[i].end(), expected[i].begin()));
    }
}

void test_reduction() {
  std::mt19937_64 random(5);
  for (const u32 q : {3u, 7u, 65537u, 1032193u, 536903681u, 1073692673u, (1u << 30) - 1})
    for (const std::size_t n : {0, 1, 7, 8, 9, 15, 16, 17, 33, 100}) {
      std::vector<u64> in(n);
      for (u64& x : in) {
        const u64 near = random() % 4 - 2;
        const u64 kinds[] = {random(), near, near * q, (u64{1} << 32) * random() + near,
                             ~u64{0} / q * q + near};
        x = kinds[random() % 5];
      }
      const u64 offset = random() % 2 ? random() : 0;
      for (const CodecKernels* table : tables()) {
        std::vector<u32> out(n);
        table->reduce(Modulus<u32>(q), offset, in.data(), n, out.data());
        for (std::size_t i = 0; i < n; ++i) CHECK(out[i] == (in[i] + offset) % q);
        for (const u64 x : in) {
          CHECK(table->any_at_least(in.data(), n, x));
          const u64 most = *std::max_element(in.begin(), in.end());
          if (most != ~u64{0}) CHECK(!table->any_at_least(in.data(), n, most + 1));
        }
      }
    }
}

// ---- bits

using Span = std::span<const std::uint8_t>;

template <class W>
void test_bits() {
  std::mt19937_64 random(1);
  for (int width = 1; width <= std::min(kMaxWidth, kBits<W>); ++width)
    for (const std::size_t count : {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200}) {
      std::vector<W> values(2 * count), back(count);
      for (W& v : values) v = static_cast<W>(random());
      const u64 mask = (u64{1} << width) - 1;
      const int drop = static_cast<int>(random() % 3);
      std::vector<std::uint8_t> plain(packed_bytes(count, width)), packed(plain.size());
      W most = 0;
      for (std::size_t i = 0; i < count; ++i) {
        const u64 value = u64{values[2 * i]} >> drop & mask;
        most = std::max(most, static_cast<W>(value));
        for (int b = 0; b < width; ++b) {
          const std::size_t bit = i * static_cast<std::size_t>(width) + static_cast<std::size_t>(b);
          plain[bit / 8] |= static_cast<std::uint8_t>((value >> b & 1) << bit % 8);
        }
      }
      pack_bits<W>(values.data(), count, 2, drop, width, packed.data());
      CHECK(packed == plain);
      for (const CodecKernels* table : tables()) {
        const auto block = exact(packed);
        const Span bytes(block.get(), packed.size());
        const auto unpack = [&](Span from, W bound) {
          return unpack_bits<W>(from, count, width, bound, back.data(), *table);
        };
        if (most != std::numeric_limits<W>::max()) CHECK(unpack(bytes, most + 1));
        for (std::size_t i = 0; i < count; ++i) CHECK(back[i] == (u64{values[2 * i]} >> drop & mask));
        if (count == 0) continue;
        CHECK(!unpack(bytes, most));
        CHECK(!unpack(bytes.first(bytes.size() - 1), most));
        const auto longer = exact([&] {
          auto b = packed;
          b.push_back(0);
          return b;
        }());
        CHECK(!unpack(Span(longer.get(), packed.size() + 1), std::numeric_limits<W>::max()));
        const std::size_t spare = 8 * packed.size() - count * static_cast<std::size_t>(width);
        for (std::size_t b = 0; b < spare; ++b) {
          block[packed.size() - 1] ^= static_cast<std::uint8_t>(0x80 >> b);
          CHECK(!unpack(bytes, std::numeric_limits<W>::max()));
          block[packed.size() - 1] ^= static_cast<std::uint8_t>(0x80 >> b);
        }
      }
    }
  CHECK(throws<std::invalid_argument>([] { unpack_bits<W>({}, 0, 0, 1, nullptr); }));
  CHECK(throws<std::invalid_argument>([] { unpack_bits<W>({}, 0, 61, 1, nullptr); }));
}

void test_packed_answers() {
  const struct {
    int width;
    std::size_t count;
    const char* bytes;
  } known[] = {
      {17, 13, "0000dc7876e361aabd1b4fc545a65a845377e3cd3f567121c63c530d"},
      {60, 11,
       "0303000000000040ac4a7fb979379e8652e92f37efc673a4df7d2c6da6da08a2d25f6ede8da79c747c9f6015178bf1bb"
       "8fa5cd54cb94097b125484530e41a5bfdcbc1bff8c9e798547f38f90908eef13ace202"},
      {1, 19, "4a4b03"}};
  for (const auto& one : known) {
    std::vector<u64> values(one.count);
    for (std::size_t i = 0; i < one.count; ++i)
      values[i] = (i * 0x9e3779b97f4a7c15 + 12345) >> (64 - one.width);
    std::vector<std::uint8_t> out(packed_bytes(one.count, one.width));
    pack_bits<u64>(values.data(), one.count, 1, 0, one.width, out.data());
    CHECK(out == hex(one.bytes));
  }
}

}  // namespace

int main() {
  test_stream();
  test_seal();
  test_redraws<u32>({1073692673, 1073643521, 1032193});
  test_redraws<u64>({1095275429376501761, 1073692673, 1125899906826241, 1095275429376448513});
  test_reduction();
  std::vector<u32> none(1);
  u32* row = none.data();
  const std::uint8_t seed[kSeedBytes] = {};
  for (const u64 bad : {u64{0}, u64{1}, u64{8}, u64{1} << 30 | 1})
    CHECK(throws<std::invalid_argument>([&] { expand_seed<u32>(seed, std::vector<u64>{bad}, 1, &row); }));
  CHECK(throws<std::invalid_argument>([] { codec_kernels("sse"); }));
  test_bits<u32>();
  test_bits<u64>();
  test_packed_answers();
  if (failures == 0) std::puts("codec: all is well");
  return failures == 0 ? 0 : 1;
}
