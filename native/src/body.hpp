// Container bodies to limbs and back (blindtail/he/container.py has the format).
//
// Headers and checksums are the caller's. Everything here is bounds-checked, and a body is
// good or `BodyError`: exact length, every residue below its prime, padding bits zero.
// std::invalid_argument means a wrong shape, which comes from the program, never from a peer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "bits.hpp"
#include "codec_kernels.hpp"
#include "seeds.hpp"

namespace blindtail {

/// The message says what is wrong and holds nothing of the content.
struct BodyError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Bytes = std::span<const std::uint8_t>;

/// Bytes of a seed and the residues of one polynomial.
std::size_t seeded_bytes(std::span<const u64> primes, std::size_t n);

/// An encrypted activation, or one digit of a key: the seed, then rows of n residues, one for each prime.
template <class W>
void parse_seeded(Bytes body, std::span<const u64> primes, std::size_t n, std::uint8_t seed[kSeedBytes],
                  W* const* rows, const CodecKernels& kernels = codec_kernels());

/// The bodies of `count` such ciphertexts, one after the other. Checks the length alone.
std::vector<Bytes> split_seeded(Bytes body, std::span<const u64> primes, std::size_t n, std::size_t count);

/// One of them row by row, for threads to share. First the length and the seed...
void parse_seed(Bytes body, std::span<const u64> primes, std::size_t n, std::uint8_t seed[kSeedBytes]);
/// ... then row i: false when a residue is not below its prime or padding bits are not zero...
template <class W>
bool parse_row(Bytes body, std::span<const u64> primes, std::size_t n, std::size_t i, W* row,
               const CodecKernels& kernels = codec_kernels());
/// ... of which this is the refusal.
[[noreturn]] void refuse_residues();

/// The inverse, for tests and a native edge.
template <class W>
std::vector<std::uint8_t> write_seeded(std::span<const u64> primes, std::size_t n,
                                       const std::uint8_t seed[kSeedBytes], const W* const* rows);

/// One digit of an evaluation key and the bytes that parse_seeded reads, with primes level_primes(level).
struct KeyDigit {
  std::size_t key, digit;
  Bytes bytes;
};

/// q_0 ... q_level and the special prime, of all key primes (special last).
std::vector<u64> level_primes(std::span<const u64> key_primes, std::size_t level);

/// The digits of a body of keys whose highest levels are `levels`, in order. Checks the length alone;
/// digits are independent, so that threads can share them.
std::vector<KeyDigit> split_keys(Bytes body, std::span<const u32> levels, std::span<const u64> key_primes,
                                 std::size_t n);

/// How a reply travels; see blindtail.he.spec.ReplyForm.
struct ReplyShape {
  u64 q0;
  std::size_t n;
  std::size_t period;
  int dropped;  // lowest bits of c1 that are not sent

  int width() const;
  std::size_t kept() const { return 2 * period; }  // coefficients of c0
  std::size_t stride() const { return n / kept(); }
  std::size_t bytes() const { return packed_bytes(kept(), width()) + packed_bytes(n, width() - dropped); }
  /// Throws std::invalid_argument when the fields contradict each other.
  void check(int word_bits) const;
};

/// c0, c1: n canonical residues modulo q0, coefficient form.
template <class W>
std::vector<std::uint8_t> write_reply(const ReplyShape& shape, const W* c0, const W* c1);

/// c0: zero off the subring. c1: with `halves` (n of 0 or 1), the mid-point of what was dropped less its
/// half, at most q0 - 1 (see container._halves); without, zeros in place of the dropped bits.
template <class W>
void parse_reply(const ReplyShape& shape, Bytes body, const std::uint8_t* halves, W* c0, W* c1,
                 const CodecKernels& kernels = codec_kernels());

#define BLINDTAIL_BODY(W, how)                                                                           \
  how void parse_seeded<W>(Bytes, std::span<const u64>, std::size_t, std::uint8_t*, W* const*,           \
                           const CodecKernels&);                                                         \
  how bool parse_row<W>(Bytes, std::span<const u64>, std::size_t, std::size_t, W*, const CodecKernels&); \
  how std::vector<std::uint8_t> write_seeded<W>(std::span<const u64>, std::size_t, const std::uint8_t*,  \
                                                const W* const*);                                        \
  how std::vector<std::uint8_t> write_reply<W>(const ReplyShape&, const W*, const W*);                   \
  how void parse_reply<W>(const ReplyShape&, Bytes, const std::uint8_t*, W*, W*, const CodecKernels&);
BLINDTAIL_BODY(u32, extern template)
BLINDTAIL_BODY(u64, extern template)

}  // namespace blindtail
