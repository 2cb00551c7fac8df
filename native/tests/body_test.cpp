// Bodies of containers and the encoder against known answers and plain definitions.
//
// The reply's known answer is from blindtail.he.container.
#include "body.hpp"

#include <bit>
#include <cmath>
#include <complex>
#include <cstring>
#include <limits>
#include <numbers>
#include <random>
#include <string>

#include "codec_check.hpp"
#include "encoder.hpp"

using namespace blindtail;

namespace {

// ---- bodies

/// The message of the BodyError that `run` ends with; empty if none.
std::string refusal(const std::function<void()>& run) {
  try {
    run();
  } catch (const BodyError& error) {
    return error.what();
  }
  return "";
}

template <class W>
void test_seeded(const std::vector<u64>& primes) {
  const std::size_t n = 36;  // with padding for odd widths
  std::mt19937_64 random(2);
  Limbs<W> in(primes.size(), n), out(primes.size(), n);
  for (std::size_t i = 0; i < primes.size(); ++i) {
    for (W& x : in.words[i]) x = static_cast<W>(random() % primes[i]);
    in.words[i][n - 1] = static_cast<W>(primes[i] - 1);
  }
  std::uint8_t seed[kSeedBytes], back[kSeedBytes];
  for (auto& byte : seed) byte = static_cast<std::uint8_t>(random());
  const auto bytes = write_seeded<W>(primes, n, seed, in.rows.data());
  CHECK(bytes.size() == seeded_bytes(primes, n));
  for (const CodecKernels* table : tables()) {
    const auto parse = [&](const std::vector<std::uint8_t>& from) {
      const auto block = exact(from);
      parse_seeded<W>({block.get(), from.size()}, primes, n, back, out.rows.data(), *table);
    };
    parse(bytes);
    CHECK(std::memcmp(seed, back, kSeedBytes) == 0 && in.words == out.words);
    for (const std::size_t size : {std::size_t{0}, std::size_t{63}, std::size_t{64}, bytes.size() - 1}) {
      const std::vector<std::uint8_t> cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
      CHECK(refusal([&] { parse(cut); }).starts_with("its length"));
    }
    auto longer = bytes;
    longer.push_back(0);
    CHECK(refusal([&] { parse(longer); }).starts_with("its length"));
    std::size_t at = kSeedBytes;
    for (std::size_t i = 0; i < primes.size(); ++i) {
      Limbs<W> bad = in;
      bad.rows.clear();
      for (auto& one : bad.words) bad.rows.push_back(one.data());
      bad.words[i][17] = static_cast<W>(primes[i]);
      CHECK(refusal([&] {
              parse(write_seeded<W>(primes, n, seed, bad.rows.data()));
            }).starts_with("a residue"));
      const int width = static_cast<int>(std::bit_width(primes[i]));
      at += packed_bytes(n, width);
      if (n * static_cast<std::size_t>(width) % 8 == 0) continue;
      auto padded = bytes;
      padded[at - 1] |= 0x80;
      CHECK(refusal([&] { parse(padded); }).starts_with("a residue"));
    }
  }
}

void test_keys() {
  const std::vector<u64> primes{1032193, 1017857, 786433, 1038337};
  const std::vector<u32> levels{2, 0, 1};
  const std::size_t n = 32;
  std::size_t total = 0;
  for (const u32 level : levels) total += (level + 1) * (64 + (level + 2) * 80);
  const std::vector<std::uint8_t> body(total + 1);
  const Bytes whole(body.data(), total);
  const auto digits = split_keys(whole, levels, primes, n);
  CHECK(digits.size() == 6);
  std::size_t at = 0;
  for (const KeyDigit& one : digits) {
    CHECK(one.bytes.data() == body.data() + at);
    CHECK(one.bytes.size() == seeded_bytes(level_primes(primes, levels[one.key]), n));
    at += one.bytes.size();
  }
  CHECK(at == total && digits[3].key == 1 && digits[5].key == 2 && digits[5].digit == 1);
  CHECK((level_primes(primes, 1) == std::vector<u64>{1032193, 1017857, 1038337}));
  for (const std::size_t size : {std::size_t{0}, std::size_t{100}, total - 1, total + 1})
    CHECK(
        refusal([&] { split_keys(Bytes(body.data(), size), levels, primes, n); }).starts_with("its length"));
  CHECK(split_keys({}, {}, primes, n).empty());
  CHECK(throws<std::invalid_argument>([&] { split_keys(whole, std::vector<u32>{3}, primes, n); }));
  CHECK(throws<std::invalid_argument>([&] { split_keys(whole, std::vector<u32>{~0u}, primes, n); }));
  CHECK(throws<std::invalid_argument>([&] { split_keys(whole, levels, primes, 0); }));
  CHECK(throws<std::invalid_argument>([&] { seeded_bytes(std::vector<u64>{u64{1} << 60}, n); }));
}

template <class W>
void test_reply() {
  const u64 q = 1073741441;
  const std::size_t n = 64;
  const ReplyShape shape{q, n, 4, 13};
  std::vector<W> c0(n), c1(n), back0(n), back1(n);
  for (std::size_t i = 0; i < n; ++i) {
    c0[i] = static_cast<W>(i * 0x9e3779b97f4a7c15 % q);
    c1[i] = static_cast<W>((i * 0xc2b2ae3d27d4eb4f + 7) % q);
  }
  c1[1] = static_cast<W>(q - 1);
  c1[2] = 0;
  const auto known = hex(
      "00000080775096c63aeb48e79b103bc798f92805c3cb20de47d6c1be67de0000feff030038da0940fabac1a31da46f0048af"
      "633f6a401a04c0eeba2aa46fa4130090aef3418a455a1e4003bb13a441a4b701d8738140aa4a9a18c057977ca493a45b0120"
      "751147ca4fda22404c9765a4e5a4ff026874a145ea541a2dc060974ea437a5a302b07731cc05525a37407597f75c09a54703"
      "f876c1d2255f9a31c06997205ddba5eb");
  const std::string bits = "1111000011100111101010011100010111110111110101100110000011101110";
  std::uint8_t halves[64];
  for (std::size_t i = 0; i < n; ++i) halves[i] = bits[i] == '1';
  CHECK(write_reply<W>(shape, c0.data(), c1.data()) == known);
  const auto parse = [&](const ReplyShape& s, const std::vector<std::uint8_t>& from,
                         const std::uint8_t* half) {
    const auto block = exact(from);
    parse_reply<W>(s, {block.get(), from.size()}, half, back0.data(), back1.data());
  };
  parse(shape, known, halves);
  for (std::size_t i = 0; i < n; ++i) CHECK(back0[i] == (i % 8 == 0 ? c0[i] : 0));
  CHECK(back1[0] == 4095 && back1[3] == 661188607 && hash(back1.data(), n) == 0x9756a2c2266c0f6b);
  parse(shape, known, nullptr);
  for (std::size_t i = 0; i < n; ++i) CHECK(back1[i] == c1[i] >> 13 << 13);
  for (const std::size_t size : {std::size_t{0}, known.size() - 1})
    CHECK(refusal([&] {
            parse(shape, {known.begin(), known.begin() + static_cast<std::ptrdiff_t>(size)}, halves);
          }).starts_with("its length"));
  // c0 = q, and a c1 whose kept bits are above those of q - 1.
  auto bad = known;
  const u64 word = q;
  std::memcpy(bad.data(), &word, 4);
  CHECK(refusal([&] { parse(shape, bad, halves); }).starts_with("a residue"));
  const ReplyShape low{1032193, n, 32, 3};  // 1032193 >> 3 = 129024 of 2^17
  std::vector<W> top(n, 1032192);
  auto bytes = write_reply<W>(low, top.data(), top.data());
  parse(low, bytes, halves);
  CHECK(back1[0] == 1032192 && back0 == top);
  top[5] = 1032200;
  bytes = write_reply<W>(low, std::vector<W>(n).data(), top.data());
  CHECK(refusal([&] { parse(low, bytes, halves); }).starts_with("a residue"));
  const ReplyShape wrong[] = {{q, n, 0, 13}, {q, n, 64, 13}, {q, n, 3, 13},
                              {q, n, 4, 30}, {q, n, 4, -1},  {2, n, 4, 0}};
  for (const ReplyShape& s : wrong)
    CHECK(throws<std::invalid_argument>([&] { write_reply<W>(s, c0.data(), c1.data()); }));
}

// ---- encoding

using Exact = std::complex<long double>;

void test_slots(int log_n, bool complex) {
  const std::size_t n = std::size_t{1} << log_n;
  std::mt19937_64 random(3);
  std::vector<double> re(n / 2), im(n / 2);
  const auto value = [&] { return std::ldexp(static_cast<double>(random()), -63) - 1; };
  for (std::size_t s = 0; s < n / 2; ++s) re[s] = value(), im[s] = complex ? value() : 0;
  SlotTransform slots(log_n);
  const double scale = 1 << 26;
  const auto m = slots.coefficients(re.data(), complex ? im.data() : nullptr, scale);
  CHECK(m.size() == n);
  std::size_t exponent = 1;
  for (std::size_t s = 0; s < n / 2; ++s, exponent = exponent * 3 % (2 * n)) {
    Exact sum = 0;
    for (std::size_t j = 0; j < n; ++j)
      sum += std::polar<long double>(1, std::numbers::pi_v<long double> * (exponent * j % (2 * n)) / n) *
             static_cast<long double>(m[j]);
    // Rounding leaves an error of variance 1/12 in each of n coefficients.
    CHECK(std::abs(sum - Exact(re[s], im[s]) * static_cast<long double>(scale)) < 3 * std::sqrt(n));
  }
}

template <class W>
void test_encoder(const std::vector<u64>& primes) {
  const int log_n = 7;
  const std::size_t n = 128;
  std::vector<Prime<W>> held;
  for (const u64 q : primes) held.emplace_back(static_cast<W>(q), log_n);
  std::vector<const Prime<W>*> list;
  for (const auto& one : held) list.push_back(&one);
  std::vector<Buffer<W>> out, ntt;
  std::vector<W*> rows, ntt_rows;
  for (std::size_t i = 0; i < primes.size(); ++i) {
    out.emplace_back(n), ntt.emplace_back(n);
    rows.push_back(out[i].data()), ntt_rows.push_back(ntt[i].data());
  }
  std::vector<double> re(n / 2);
  SlotTransform slots(log_n);
  const Kernels<W>& portable = portable_kernels<W>();
  for (const CodecKernels* table : tables()) {
    Encoder<W> encoder(log_n, *table);
    for (const double scale : {1.0, 0x1p20, 0x1p40, 0x1p61}) {
      for (std::size_t s = 0; s < n / 2; ++s) re[s] = std::sin(static_cast<double>(s * s + 1));
      const auto m = slots.coefficients(re.data(), nullptr, scale);
      encoder.encode(re.data(), nullptr, scale, list, nullptr, rows.data());
      encoder.encode(re.data(), nullptr, scale, list, &portable, ntt_rows.data());
      for (std::size_t i = 0; i < primes.size(); ++i) {
        for (std::size_t j = 0; j < n; ++j) {
          const auto rest = m[j] % static_cast<std::int64_t>(primes[i]);
          CHECK(rows[i][j] == static_cast<W>(rest < 0 ? rest + static_cast<std::int64_t>(primes[i]) : rest));
        }
        portable.ntt(held[i], rows[i], rows[i]);
        CHECK(std::equal(rows[i], rows[i] + n, ntt_rows[i]));
      }
    }
    // A constant has one coefficient; the largest that is still taken is just below 2^62.
    std::fill(re.begin(), re.end(), -0x1.fffffffffffffp61);
    encoder.encode(re.data(), nullptr, 1, list, nullptr, rows.data());
    const auto largest = -static_cast<__int128>(0x1.fffffffffffffp61) % static_cast<__int128>(primes[0]);
    CHECK(rows[0][0] == static_cast<W>(largest + primes[0]) && rows[0][1] == 0);
    for (const double bad :
         {0x1p62, -0x1p62, 1e300, static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
      std::fill(re.begin(), re.end(), bad);
      CHECK(throws<std::invalid_argument>(
          [&] { encoder.encode(re.data(), nullptr, 1, list, nullptr, rows.data()); }));
      if (std::isfinite(bad) && std::fabs(bad) < 1e300) continue;
      std::fill(re.begin(), re.end(), 0);
      re[9] = bad;
      CHECK(throws<std::invalid_argument>([&] { slots.coefficients(re.data(), nullptr, 1); }));
      re[9] = 0;
      CHECK(throws<std::invalid_argument>(
          [&] { slots.coefficients(re.data(), nullptr, std::fabs(bad) * 1e10); }));
    }
  }
  CHECK(throws<std::invalid_argument>([] { SlotTransform(4); }));
  CHECK(throws<std::invalid_argument>([] { SlotTransform(17); }));
  CHECK(throws<std::invalid_argument>(
      [&] { Encoder<W>(6).encode(re.data(), nullptr, 1, list, nullptr, rows.data()); }));
}

}  // namespace

int main() {
  test_seeded<u32>({1073692673, 1032193, 786433});
  test_seeded<u64>({1073692673, 1095275429376501761, 1032193, 1125899906826241});
  test_keys();
  test_reply<u32>();
  test_reply<u64>();
  for (int log_n = 5; log_n <= 9; ++log_n)
    test_slots(log_n, log_n % 2 == 0), test_slots(log_n, log_n % 2 != 0);
  test_encoder<u32>({1073692673, 1032193});
  test_encoder<u64>({1073692673, 1095275429376501761});
  if (failures == 0) std::puts("bodies and encoder: all is well");
  return failures == 0 ? 0 : 1;
}
