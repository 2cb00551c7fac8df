#include "body.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace blindtail {
namespace {

int width_of(u64 prime, int word_bits) {
  const int width = static_cast<int>(std::bit_width(prime));
  if (prime < 3 || width > std::min(kMaxWidth, word_bits))
    throw std::invalid_argument("a prime is outside its word's range");
  return width;
}

void check_degree(std::size_t n) {
  if (n == 0 || n > std::size_t{1} << 20) throw std::invalid_argument("a ring degree is out of range");
}

[[noreturn]] void refuse_length() {
  throw BodyError("its length is not the program's; it was cut or padded");
}

}  // namespace

void refuse_residues() {
  throw BodyError("a residue is not below its prime, or padding bits are not zero; the sender is broken");
}

std::size_t seeded_bytes(std::span<const u64> primes, std::size_t n) {
  check_degree(n);
  std::size_t total = kSeedBytes;
  for (const u64 q : primes) total += packed_bytes(n, width_of(q, 64));
  return total;
}

std::vector<Bytes> split_seeded(Bytes body, std::span<const u64> primes, std::size_t n, std::size_t count) {
  const std::size_t size = seeded_bytes(primes, n);
  if (body.size() != size * count) refuse_length();
  std::vector<Bytes> parts;
  for (std::size_t i = 0; i < count; ++i) parts.push_back(body.subspan(i * size, size));
  return parts;
}

void parse_seed(Bytes body, std::span<const u64> primes, std::size_t n, std::uint8_t seed[kSeedBytes]) {
  if (body.size() != seeded_bytes(primes, n)) refuse_length();
  std::memcpy(seed, body.data(), kSeedBytes);
}

template <class W>
bool parse_row(Bytes body, std::span<const u64> primes, std::size_t n, std::size_t i, W* row,
               const CodecKernels& kernels) {
  const std::size_t at = seeded_bytes(primes.first(i), n);
  const int width = width_of(primes[i], kBits<W>);
  return unpack_bits<W>(body.subspan(at, packed_bytes(n, width)), n, width, static_cast<W>(primes[i]), row,
                        kernels);
}

template <class W>
void parse_seeded(Bytes body, std::span<const u64> primes, std::size_t n, std::uint8_t seed[kSeedBytes],
                  W* const* rows, const CodecKernels& kernels) {
  parse_seed(body, primes, n, seed);
  for (std::size_t i = 0; i < primes.size(); ++i)
    if (!parse_row<W>(body, primes, n, i, rows[i], kernels)) refuse_residues();
}

template <class W>
std::vector<std::uint8_t> write_seeded(std::span<const u64> primes, std::size_t n,
                                       const std::uint8_t seed[kSeedBytes], const W* const* rows) {
  std::vector<std::uint8_t> out(seeded_bytes(primes, n));
  std::memcpy(out.data(), seed, kSeedBytes);
  std::size_t at = kSeedBytes;
  for (std::size_t i = 0; i < primes.size(); ++i) {
    const int width = width_of(primes[i], kBits<W>);
    pack_bits<W>(rows[i], n, 1, 0, width, out.data() + at);
    at += packed_bytes(n, width);
  }
  return out;
}

std::vector<u64> level_primes(std::span<const u64> key_primes, std::size_t level) {
  if (key_primes.size() < 2 || level > key_primes.size() - 2)
    throw std::invalid_argument("a key's level is above the parameters'");
  std::vector<u64> primes(key_primes.begin(), key_primes.begin() + static_cast<std::ptrdiff_t>(level) + 1);
  primes.push_back(key_primes.back());
  return primes;
}

std::vector<KeyDigit> split_keys(Bytes body, std::span<const u32> levels, std::span<const u64> key_primes,
                                 std::size_t n) {
  std::vector<KeyDigit> digits;
  std::size_t at = 0;
  for (std::size_t key = 0; key < levels.size(); ++key) {
    const std::size_t size = seeded_bytes(level_primes(key_primes, levels[key]), n);
    for (std::size_t digit = 0; digit <= levels[key]; ++digit) {
      if (size > body.size() - at) refuse_length();
      digits.push_back({key, digit, body.subspan(at, size)});
      at += size;
    }
  }
  if (at != body.size()) refuse_length();
  return digits;
}

int ReplyShape::width() const { return static_cast<int>(std::bit_width(q0)); }

void ReplyShape::check(int word_bits) const {
  check_degree(n);
  const int bits = width_of(q0, word_bits);
  if (period == 0 || period > n / 2 || n % (2 * period) != 0 || dropped < 0 || dropped >= bits)
    throw std::invalid_argument("the form of a reply contradicts itself");
}

template <class W>
std::vector<std::uint8_t> write_reply(const ReplyShape& shape, const W* c0, const W* c1) {
  shape.check(kBits<W>);
  std::vector<std::uint8_t> out(shape.bytes());
  pack_bits<W>(c0, shape.kept(), shape.stride(), 0, shape.width(), out.data());
  pack_bits<W>(c1, shape.n, 1, shape.dropped, shape.width() - shape.dropped,
               out.data() + packed_bytes(shape.kept(), shape.width()));
  return out;
}

template <class W>
void parse_reply(const ReplyShape& shape, Bytes body, const std::uint8_t* halves, W* c0, W* c1,
                 const CodecKernels& kernels) {
  shape.check(kBits<W>);
  if (body.size() != shape.bytes()) refuse_length();
  const int width = shape.width(), drop = shape.dropped;
  const W most = static_cast<W>(shape.q0 - 1);
  const std::size_t kept = shape.kept(), stride = shape.stride(), size = packed_bytes(kept, width);
  if (!unpack_bits<W>(body.first(size), kept, width, most + 1, c0, kernels)) refuse_residues();
  for (std::size_t i = kept; stride > 1 && i-- > 0;) {  // from the end: c0[i] goes to the right
    const W value = c0[i];
    std::fill_n(c0 + i * stride, stride, W{0});
    c0[i * stride] = value;
  }
  // value << drop <= q0 - 1
  if (!unpack_bits<W>(body.subspan(size), shape.n, width - drop, (most >> drop) + 1, c1, kernels))
    refuse_residues();
  if (drop == 0) return;
  const W middle = halves == nullptr ? 0 : W{1} << (drop - 1);
  for (std::size_t i = 0; i < shape.n; ++i) {
    const W value = (c1[i] << drop) + middle - (halves == nullptr ? 0 : halves[i] & 1);
    c1[i] = std::min(value, most);
  }
}

BLINDTAIL_BODY(u32, template)
BLINDTAIL_BODY(u64, template)

}  // namespace blindtail
