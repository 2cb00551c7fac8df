// CKKS encoding: slots to a plaintext polynomial, in SEAL's order of slots.
//
// Slot s is the polynomial's value at zeta^(3^s), zeta = exp(i pi / N); its conjugate is the
// value at zeta^(-3^s). Of each pair of exponents e, -e one is 1 mod 4, where
// zeta^(e N/2) = i, so that
//   m(zeta^e) = sum over j < N/2 of (a_j + i a_(j + N/2)) zeta^(e j):
// N/2 complex numbers w_j, whose discrete Fourier transform after a twist by zeta^j is the slots,
// every second one conjugated. Encoding is one complex FFT of size N/2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec_kernels.hpp"
#include "kernels.hpp"
#include "memory.hpp"

namespace blindtail {

/// Coefficients as signed integers; not thread-safe, as it owns its scratch.
class SlotTransform {
 public:
  /// 5 <= log_n <= 16, or std::invalid_argument.
  explicit SlotTransform(int log_n);
  std::size_t n() const { return n_; }

  /// The N coefficients times `scale`, rounded to nearest. `im` may be null (real slots); N/2 values each.
  /// Throws std::invalid_argument when a value is not finite or a coefficient's size reaches 2^62.
  std::span<const std::int64_t> coefficients(const double* re, const double* im, double scale);

 private:
  void transform();

  std::size_t n_, half_;
  std::vector<u32> slot_;               // by FFT input position (bit-reversed)
  Buffer<double> sign_;                 // +1, or -1 where the slot is conjugated
  Buffer<double> root_re_, root_im_;    // stage of blocks 2h: exp(-i pi j / h) at h + j
  Buffer<double> twist_re_, twist_im_;  // zeta^-j
  Buffer<double> re_, im_;              // scratch
  Buffer<std::int64_t> rounded_;
};

template <class W>
class Encoder {
 public:
  explicit Encoder(int log_n, const CodecKernels& codec = codec_kernels()) : slots_(log_n), codec_(codec) {}

  /// rows[i]: N canonical residues modulo *primes[i], NTT form; coefficient form without `kernels`.
  /// rows are 64-byte aligned. Throws as SlotTransform::coefficients does.
  void encode(const double* re, const double* im, double scale, std::span<const Prime<W>* const> primes,
              const Kernels<W>* kernels, W* const* rows);

 private:
  SlotTransform slots_;
  const CodecKernels& codec_;
};

extern template class Encoder<u32>;
extern template class Encoder<u64>;

}  // namespace blindtail
