// Every parser of bodies and the unpackers under them, on any bytes: no read outside the body, the same
// answer from every instruction set, and what is accepted is exactly what writing gives again.
//
// Input: byte 0 chooses the parser, bytes 1 ... 7 its shape (see below), the body follows. Shapes come
// from a program in real life, so here they are always valid. If bit 7 of byte 0 is set the body is cut
// or filled with zeros to the length that the shape wants; otherwise most lengths are refused at once.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "body.hpp"

using namespace blindtail;

namespace {

constexpr std::size_t kHead = 8;

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
  bool same(const std::vector<std::uint8_t>& other) const {
    return std::equal(other.begin(), other.end(), data.get(), data.get() + size);
  }
};

const std::vector<const CodecKernels*>& tables() {
  static const auto found = [] {
    std::vector<const CodecKernels*> list;
    for (const char* name : {"portable", "avx2", "avx512"}) {
      try {
        list.push_back(&codec_kernels(name));
      } catch (const std::invalid_argument&) {
      }
    }
    return list;
  }();
  return found;
}

/// Whether `parse` accepts; any other exception than BodyError is a fault.
template <class Parse>
bool accepts(Parse parse) {
  try {
    parse();
    return true;
  } catch (const BodyError&) {
    return false;
  }
}

template <class W>
constexpr u64 kPrimes[8] = {1032193, 786433, 1073692673, 1073643521, 536903681, 12289, 257, 769};
template <>
constexpr u64 kPrimes<u64>[8] = {1095275429376501761,
                                 1152921504606830593,
                                 1125899906826241,
                                 1073692673,
                                 1032193,
                                 4398046150657,
                                 12289,
                                 257};

template <class W>
void unpack(const std::uint8_t* head, Bytes body, bool fit) {
  const int width = 1 + head[1] % std::min(kMaxWidth, kBits<W>);
  const std::size_t count = (head[2] | head[3] << 8) % 600;
  const u64 all = (u64{1} << width) - 1;
  const W most = static_cast<W>(head[4] == 0 ? all : all - all * head[4] / 256);
  const W bound = static_cast<W>(most + 1);  // 0 for 2^32: nothing is below it
  const Block block(body, fit, packed_bytes(count, width));
  std::vector<W> first(count), values(count);
  bool good = false;
  for (const CodecKernels* table : tables()) {
    const bool now = unpack_bits<W>(block.bytes(), count, width, bound, values.data(), *table);
    if (table == tables().front()) good = now, first = values;
    require(now == good && (!good || values == first));
  }
  if (!good) return;
  for (std::size_t i = 0; i < count; ++i) {
    u64 value = 0;
    for (int b = 0; b < width; ++b) {
      const std::size_t bit = i * static_cast<std::size_t>(width) + static_cast<std::size_t>(b);
      value |= (u64{block.data[bit / 8]} >> bit % 8 & 1) << b;
    }
    require(first[i] == value && value <= most);
  }
  std::vector<std::uint8_t> again(packed_bytes(count, width));
  pack_bits<W>(first.data(), count, 1, 0, width, again.data());
  require(block.same(again));
}

template <class W>
void seeded_body(const Block& block, const std::vector<u64>& primes, std::size_t n) {
  std::vector<std::vector<W>> words(primes.size(), std::vector<W>(n));
  std::vector<W*> rows;
  for (auto& one : words) rows.push_back(one.data());
  std::uint8_t seed[kSeedBytes];
  bool good = false;
  for (const CodecKernels* table : tables()) {
    const bool now = accepts([&] { parse_seeded<W>(block.bytes(), primes, n, seed, rows.data(), *table); });
    if (table == tables().front()) good = now;
    require(now == good);
    if (!good) continue;
    for (std::size_t i = 0; i < primes.size(); ++i)
      for (const W word : words[i]) require(word < primes[i]);
    require(block.same(write_seeded<W>(primes, n, seed, rows.data())));
  }
}

template <class W>
void seeded(const std::uint8_t* head, Bytes body, bool fit) {
  std::vector<u64> primes(1 + head[1] % 4);
  for (std::size_t i = 0; i < primes.size(); ++i) primes[i] = kPrimes<W>[head[2 + i] % 8];
  const std::size_t n = 1 + head[6] % 64;
  seeded_body<W>(Block(body, fit, seeded_bytes(primes, n)), primes, n);
}

template <class W>
void keys(const std::uint8_t* head, Bytes body, bool fit) {
  std::vector<u64> primes(2 + head[1] % 3);
  for (std::size_t i = 0; i < primes.size(); ++i) primes[i] = kPrimes<W>[(head[2] / 32 + i) % 8];
  std::vector<u32> levels(head[2] % 4);
  for (std::size_t i = 0; i < levels.size(); ++i)
    levels[i] = static_cast<u32>(head[3 + i] % (primes.size() - 1));
  const std::size_t n = 1 + head[6] % 40;
  std::size_t total = 0;
  for (const u32 level : levels) total += (level + 1) * seeded_bytes(level_primes(primes, level), n);
  const Block block(body, fit, total);
  std::vector<KeyDigit> digits;
  const bool good = accepts([&] { digits = split_keys(block.bytes(), levels, primes, n); });
  require(good == (block.size == total));
  for (const KeyDigit& one : digits)
    seeded_body<W>(Block(one.bytes, false, 0), level_primes(primes, levels[one.key]), n);
}

template <class W>
void reply(const std::uint8_t* head, Bytes body, bool fit) {
  const u64 q = kPrimes<W>[head[1] % 8];
  const std::size_t n = std::size_t{2} << head[2] % 7;
  ReplyShape shape{q, n, std::max<std::size_t>(1, n / 2 >> head[3] % 7), 0};
  shape.dropped = head[4] % shape.width();
  const Block block(body, fit, shape.bytes());
  std::vector<W> c0(n), c1(n);
  std::vector<std::uint8_t> halves(n);
  for (std::size_t i = 0; i < n; ++i) halves[i] = head[5] >> i % 8 & 1;
  bool good = false;
  for (const CodecKernels* table : tables()) {
    const bool now =
        accepts([&] { parse_reply<W>(shape, block.bytes(), nullptr, c0.data(), c1.data(), *table); });
    if (table == tables().front()) good = now;
    require(now == good);
    if (good) require(block.same(write_reply<W>(shape, c0.data(), c1.data())));
  }
  require(good ==
          accepts([&] { parse_reply<W>(shape, block.bytes(), halves.data(), c0.data(), c1.data()); }));
  if (good)
    for (std::size_t i = 0; i < n; ++i) require(c0[i] < q && c1[i] < q);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < kHead) return 0;
  const Bytes body(data + kHead, size - kHead);
  const bool fit = data[0] >> 7 != 0;
  switch (data[0] % 8) {
    case 0:
      unpack<u32>(data, body, fit);
      break;
    case 1:
      unpack<u64>(data, body, fit);
      break;
    case 2:
      seeded<u32>(data, body, fit);
      break;
    case 3:
      seeded<u64>(data, body, fit);
      break;
    case 4:
      keys<u32>(data, body, fit);
      break;
    case 5:
      keys<u64>(data, body, fit);
      break;
    case 6:
      reply<u32>(data, body, fit);
      break;
    default:
      reply<u64>(data, body, fit);
      break;
  }
  return 0;
}
