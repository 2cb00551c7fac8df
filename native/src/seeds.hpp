// Seeds into uniform polynomials, word for word as SEAL 4.x expands them.
//
// The stream: BLAKE2Xb keyed by the 64-byte seed, blocks of 4096 bytes, block i hashing i as
// 8 bytes. A polynomial takes one 64-bit word for each residue, prime after prime. A word
// above the last multiple of its prime is redrawn, after the words of ALL primes, in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec_kernels.hpp"

namespace blindtail {

inline constexpr std::size_t kSeedBytes = 64;
inline constexpr std::size_t kStreamBlockWords = 512;

/// A stream of words in blocks of 512. Tests inject their own.
class WordStream {
 public:
  virtual ~WordStream() = default;
  /// Blocks first, first + 1, ...; out has 512 * count words.
  virtual void blocks(u64 first, std::size_t count, u64* out) = 0;
};

/// Its blocks can be had by several threads at once.
class SeedStream final : public WordStream {
 public:
  explicit SeedStream(const std::uint8_t seed[kSeedBytes], const CodecKernels& kernels = codec_kernels());
  void blocks(u64 first, std::size_t count, u64* out) override { kernels_.blocks(keyed_, first, count, out); }

 private:
  const CodecKernels& kernels_;
  u64 keyed_[8];
};

/// The lowest word that is redrawn modulo q.
constexpr u64 rejection_bound(u64 q) { return ~u64{0} - ~u64{0} % q - 1; }

/// A uniform polynomial in the making, in pieces that threads can share.
///
/// rows[i] gets the n residues modulo primes[i], unless it is null: a key trimmed to level l keeps
/// rows 0 ... l and the last of all key primes. Costs little more than the rows asked for.
template <class W>
class Sampling {
 public:
  /// Throws std::invalid_argument unless all primes are odd and fit (u32: below 2^30, u64: 2^60). All that is
  /// given stays the caller's; `stream` gives blocks to several threads at once where they make pieces.
  Sampling(WordStream& stream, std::span<const u64> primes, std::size_t n, W* const* rows,
           const CodecKernels& kernels = codec_kernels());

  std::size_t pieces_of_row() const { return (n_ + kPiece - 1) / kPiece; }
  /// Piece `piece` < pieces_of_row() of row r; each once, in any order, by any thread.
  void make(std::size_t r, std::size_t piece);
  /// After all of them, by one thread: the words that are drawn again.
  void finish();

 private:
  static constexpr std::size_t kPiece = 8 * kStreamBlockWords;  // 32 KiB of the stream: a first-level cache

  WordStream& stream_;
  std::span<const u64> primes_;
  std::size_t n_;
  W* const* rows_;
  const CodecKernels& kernels_;
  std::vector<std::uint8_t> rejected_;  // by row and piece
};

extern template class Sampling<u32>;
extern template class Sampling<u64>;

/// The whole of it, by the caller alone.
template <class W>
void sample_uniform(WordStream& stream, std::span<const u64> primes, std::size_t n, W* const* rows,
                    const CodecKernels& kernels = codec_kernels()) {
  Sampling<W> sampling(stream, primes, n, rows, kernels);
  for (std::size_t r = 0; r < primes.size(); ++r)
    for (std::size_t piece = 0; piece < sampling.pieces_of_row(); ++piece) sampling.make(r, piece);
  sampling.finish();
}

template <class W>
void expand_seed(const std::uint8_t seed[kSeedBytes], std::span<const u64> primes, std::size_t n,
                 W* const* rows, const CodecKernels& kernels = codec_kernels()) {
  SeedStream stream(seed, kernels);
  sample_uniform<W>(stream, primes, n, rows, kernels);
}

}  // namespace blindtail
