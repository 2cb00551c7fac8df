#include "encoder.hpp"

#include <cmath>
#include <numbers>
#include <stdexcept>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Loops whose turns touch different words, which compilers do not see for themselves.
#if defined(__clang__)
#define BLINDTAIL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define BLINDTAIL_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace blindtail {
namespace {

constexpr double kLimit = 4611686018427387904.0;  // 2^62

/// exp(i pi num / den), 0 <= num <= den, as exact as long double gives it.
std::pair<double, double> unit(std::size_t num, std::size_t den) {
  const long double angle = std::numbers::pi_v<long double> * static_cast<long double>(num) / den;
  return {static_cast<double>(std::cos(angle)), static_cast<double>(std::sin(angle))};
}

inline std::int64_t nearest(double x) {
#if defined(__SSE2__)
  return _mm_cvtsd_si64(_mm_set_sd(x));  // std::llrint would be a call
#else
  return std::llrint(x);
#endif
}

/// Two radix-2 stages at once, blocks 4h: h values of the first stage's roots v, of the second's w.
/// Of the second's other half the roots are -i w.
void two_stages(double* __restrict re, double* __restrict im, std::size_t n, std::size_t h,
                const double* __restrict root_re, const double* __restrict root_im) {
  const double *vr = root_re + h, *vi = root_im + h, *wr = root_re + 2 * h, *wi = root_im + 2 * h;
  for (std::size_t block = 0; block < n; block += 4 * h) {
    double *r = re + block, *s = im + block;
    BLINDTAIL_INDEPENDENT
    for (std::size_t j = 0; j < h; ++j) {
      const double b_r = r[j + h] * vr[j] - s[j + h] * vi[j], b_i = r[j + h] * vi[j] + s[j + h] * vr[j];
      const double d_r = r[j + 3 * h] * vr[j] - s[j + 3 * h] * vi[j];
      const double d_i = r[j + 3 * h] * vi[j] + s[j + 3 * h] * vr[j];
      const double p_r = r[j] + b_r, p_i = s[j] + b_i, q_r = r[j] - b_r, q_i = s[j] - b_i;
      const double c_r = r[j + 2 * h], c_i = s[j + 2 * h];
      const double x_r = c_r + d_r, x_i = c_i + d_i, y_r = c_r - d_r, y_i = c_i - d_i;
      const double t_r = x_r * wr[j] - x_i * wi[j], t_i = x_r * wi[j] + x_i * wr[j];
      const double u_r = y_r * wr[j] - y_i * wi[j], u_i = y_r * wi[j] + y_i * wr[j];
      r[j] = p_r + t_r, s[j] = p_i + t_i;
      r[j + 2 * h] = p_r - t_r, s[j + 2 * h] = p_i - t_i;
      r[j + h] = q_r + u_i, s[j + h] = q_i - u_r;
      r[j + 3 * h] = q_r - u_i, s[j + 3 * h] = q_i + u_r;
    }
  }
}

void one_stage(double* __restrict re, double* __restrict im, std::size_t n, std::size_t h,
               const double* __restrict root_re, const double* __restrict root_im) {
  const double *vr = root_re + h, *vi = root_im + h;
  for (std::size_t block = 0; block < n; block += 2 * h) {
    double *r = re + block, *s = im + block;
    BLINDTAIL_INDEPENDENT
    for (std::size_t j = 0; j < h; ++j) {
      const double b_r = r[j + h] * vr[j] - s[j + h] * vi[j], b_i = r[j + h] * vi[j] + s[j + h] * vr[j];
      const double a_r = r[j], a_i = s[j];
      r[j] = a_r + b_r, s[j] = a_i + b_i;
      r[j + h] = a_r - b_r, s[j + h] = a_i - b_i;
    }
  }
}

/// The first two stages, whose roots are 1 and -i.
void first_stages(double* __restrict re, double* __restrict im, std::size_t n) {
  for (std::size_t i = 0; i < n; i += 4) {
    const double p_r = re[i] + re[i + 1], q_r = re[i] - re[i + 1];
    const double p_i = im[i] + im[i + 1], q_i = im[i] - im[i + 1];
    const double x_r = re[i + 2] + re[i + 3], y_r = re[i + 2] - re[i + 3];
    const double x_i = im[i + 2] + im[i + 3], y_i = im[i + 2] - im[i + 3];
    re[i] = p_r + x_r, im[i] = p_i + x_i;
    re[i + 2] = p_r - x_r, im[i + 2] = p_i - x_i;
    re[i + 1] = q_r + y_i, im[i + 1] = q_i - y_r;
    re[i + 3] = q_r - y_i, im[i + 3] = q_i + y_r;
  }
}

}  // namespace

SlotTransform::SlotTransform(int log_n) : n_(std::size_t{1} << (log_n & 31)), half_(n_ / 2) {
  if (log_n < 5 || log_n > 16) throw std::invalid_argument("the ring degree must be 2^5 ... 2^16");
  slot_.resize(half_);
  for (Buffer<double>* buffer : {&sign_, &root_re_, &root_im_, &twist_re_, &twist_im_, &re_, &im_})
    *buffer = Buffer<double>(half_);
  rounded_ = Buffer<std::int64_t>(n_);
  u32 exponent = 1;
  for (std::size_t s = 0; s < half_; ++s) {
    const bool conjugate = exponent % 4 == 3;
    const u32 one_mod_4 = conjugate ? static_cast<u32>(2 * n_) - exponent : exponent;
    const u32 at = reverse_bits(one_mod_4 / 4, log_n - 1);
    slot_[at] = static_cast<u32>(s);
    sign_[at] = conjugate ? -1.0 : 1.0;
    exponent = static_cast<u32>(u64{exponent} * 3 % (2 * n_));
  }
  for (std::size_t h = 1; h < half_; h *= 2)
    for (std::size_t j = 0; j < h; ++j) {
      const auto [c, s] = unit(j, h);
      root_re_[h + j] = c;
      root_im_[h + j] = -s;
    }
  for (std::size_t j = 0; j < half_; ++j) {
    const auto [c, s] = unit(j, n_);
    twist_re_[j] = c;
    twist_im_[j] = -s;
  }
}

void SlotTransform::transform() {
  first_stages(re_.data(), im_.data(), half_);
  std::size_t h = 4;
  for (; 2 * h < half_; h *= 4)
    two_stages(re_.data(), im_.data(), half_, h, root_re_.data(), root_im_.data());
  if (h < half_) one_stage(re_.data(), im_.data(), half_, h, root_re_.data(), root_im_.data());
}

std::span<const std::int64_t> SlotTransform::coefficients(const double* re, const double* im, double scale) {
  for (std::size_t i = 0; i < half_; ++i) re_[i] = re[slot_[i]];
  for (std::size_t i = 0; i < half_; ++i) im_[i] = im == nullptr ? 0.0 : sign_[i] * im[slot_[i]];
  transform();
  // A value that is not finite, or an overflow, reaches every coefficient as NaN or infinity.
  const double factor = scale / static_cast<double>(half_);
  bool good = std::isfinite(factor);
  for (std::size_t j = 0; j < half_; ++j) {
    const double r = (re_[j] * twist_re_[j] - im_[j] * twist_im_[j]) * factor;
    const double s = (re_[j] * twist_im_[j] + im_[j] * twist_re_[j]) * factor;
    re_[j] = r;
    im_[j] = s;
    good &= (std::fabs(r) < kLimit) & (std::fabs(s) < kLimit);
  }
  if (!good) throw std::invalid_argument("values to encode are not finite, or too large for their scale");
  for (std::size_t j = 0; j < half_; ++j) rounded_[j] = nearest(re_[j]);
  for (std::size_t j = 0; j < half_; ++j) rounded_[j + half_] = nearest(im_[j]);
  return {rounded_.data(), n_};
}

template <class W>
void Encoder<W>::encode(const double* re, const double* im, double scale,
                        std::span<const Prime<W>* const> primes, const Kernels<W>* kernels, W* const* rows) {
  const auto coefficients = slots_.coefficients(re, im, scale);
  const auto* words = reinterpret_cast<const u64*>(coefficients.data());
  for (std::size_t i = 0; i < primes.size(); ++i) {
    const Prime<W>& prime = *primes[i];
    const u64 q = prime.mod.q;
    if (prime.n != slots_.n()) throw std::invalid_argument("a prime belongs to another ring");
    const u64 offset = ((u64{1} << 62) / q + 1) * q;  // sums with it are positive and below 2^63 + 2^60
    if constexpr (std::is_same_v<W, u32>) {
      codec_.reduce(prime.mod, offset, words, slots_.n(), rows[i]);
    } else {
      const u64 ratio = ~u64{0} / q;
      for (std::size_t j = 0; j < slots_.n(); ++j) {
        const u64 x = words[j] + offset;
        rows[i][j] = reduce_once<u64>(x - mul_high<u64>(x, ratio) * q, q);
      }
    }
    if (kernels != nullptr) kernels->ntt(prime, rows[i], rows[i]);
  }
}

template class Encoder<u32>;
template class Encoder<u64>;

}  // namespace blindtail
