#include "seeds.hpp"

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace blindtail {
namespace {

constexpr std::size_t kChunk = 8;  // blocks made at once

template <class W>
struct Reduction {
  u64 q, ratio;
  Modulus<u32> narrow;

  explicit Reduction(u64 prime) : q(prime), ratio(~u64{0} / prime) {
    if constexpr (std::is_same_v<W, u32>) narrow = Modulus<u32>(static_cast<u32>(prime));
  }
  void operator()(const CodecKernels& kernels, const u64* in, std::size_t n, W* out) const {
    if constexpr (std::is_same_v<W, u32>) {
      kernels.reduce(narrow, 0, in, n, out);
    } else {
      // Barrett: the quotient by floor(2^64 / q) is right or one too small.
      for (std::size_t i = 0; i < n; ++i)
        out[i] = reduce_once<u64>(in[i] - mul_high<u64>(in[i], ratio) * q, q);
    }
  }
};

/// Calls use(index within the range, words, count) over words [begin, begin + n) of the stream.
template <class Use>
void over_words(WordStream& stream, u64 begin, std::size_t n, u64* buffer, Use use) {
  const u64 end = begin + n, last = (end + kStreamBlockWords - 1) / kStreamBlockWords;
  for (u64 block = begin / kStreamBlockWords; block < last; block += kChunk) {
    const std::size_t count = std::min<u64>(kChunk, last - block);
    stream.blocks(block, count, buffer);
    const u64 start = block * kStreamBlockWords;
    const u64 from = std::max(begin, start), to = std::min(end, start + count * kStreamBlockWords);
    use(static_cast<std::size_t>(from - begin), buffer + (from - start), static_cast<std::size_t>(to - from));
  }
}

/// The words of a stream one by one.
class Reader {
 public:
  Reader(WordStream& stream, u64 at) : stream_(stream), at_(at) {}
  u64 next() {
    const u64 block = at_ / kStreamBlockWords;
    if (block != held_) stream_.blocks(held_ = block, 1, words_);
    return words_[at_++ % kStreamBlockWords];
  }

 private:
  WordStream& stream_;
  u64 at_, held_ = ~u64{0};
  u64 words_[kStreamBlockWords];
};

}  // namespace

SeedStream::SeedStream(const std::uint8_t seed[kSeedBytes], const CodecKernels& kernels) : kernels_(kernels) {
  keyed_state(seed, keyed_);
}

template <class W>
Sampling<W>::Sampling(WordStream& stream, std::span<const u64> primes, std::size_t n, W* const* rows,
                      const CodecKernels& kernels)
    : stream_(stream), primes_(primes), n_(n), rows_(rows), kernels_(kernels) {
  constexpr u64 kLimit = u64{1} << (kBits<W> == 32 ? 30 : 60);
  for (const u64 q : primes)
    if (q < 3 || q % 2 == 0 || q >= kLimit)
      throw std::invalid_argument("a prime is even or outside its word's range");
  rejected_.resize(primes.size() * pieces_of_row());
}

template <class W>
void Sampling<W>::make(std::size_t r, std::size_t piece) {
  if (rows_[r] == nullptr) return;
  alignas(64) u64 buffer[kChunk * kStreamBlockWords];
  const Reduction<W> reduction(primes_[r]);
  const u64 bound = rejection_bound(primes_[r]);
  const std::size_t first = piece * kPiece, many = std::min(kPiece, n_ - first);
  W* out = rows_[r] + first;
  bool rejected = false;
  over_words(stream_, u64{r} * n_ + first, many, buffer,
             [&](std::size_t at, const u64* words, std::size_t count) {
               rejected |= kernels_.any_at_least(words, count, bound);
               reduction(kernels_, words, count, out + at);
             });
  rejected_[r * pieces_of_row() + piece] = rejected;
}

template <class W>
void Sampling<W>::finish() {
  const std::size_t pieces = pieces_of_row();
  const auto rejected = [&](std::size_t r) {
    const auto begin = rejected_.begin() + static_cast<std::ptrdiff_t>(r * pieces);
    return std::any_of(begin, begin + static_cast<std::ptrdiff_t>(pieces),
                       [](std::uint8_t x) { return x != 0; });
  };
  std::size_t end = primes_.size();  // rows that redraws concern
  while (end > 0 && !rejected(end - 1)) --end;
  if (end == 0) return;
  // Rows nobody wants take redrawn words too, so that they must be looked through as well.
  alignas(64) u64 buffer[kChunk * kStreamBlockWords];
  Reader reader(stream_, u64{primes_.size()} * n_);
  for (std::size_t r = 0; r < end; ++r) {
    if (rows_[r] != nullptr && !rejected(r)) continue;
    const u64 bound = rejection_bound(primes_[r]);
    over_words(stream_, u64{r} * n_, n_, buffer, [&](std::size_t at, const u64* words, std::size_t count) {
      for (std::size_t i = 0; i < count; ++i) {
        if (words[i] < bound) continue;
        u64 word = reader.next();
        while (word >= bound) word = reader.next();
        if (rows_[r] != nullptr) rows_[r][at + i] = static_cast<W>(word % primes_[r]);
      }
    });
  }
}

template class Sampling<u32>;
template class Sampling<u64>;

}  // namespace blindtail
