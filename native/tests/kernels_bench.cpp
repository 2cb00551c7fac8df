// Microseconds a call of each kernel, one limb: the lowest of several medians.
//   kernels_bench [avx512|avx2|portable ...]
// Rows are hot in the caches, except in lines that say "streamed": those go through 96 MiB.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <vector>

#include "kernels.hpp"

using namespace blindtail;

namespace {

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double measure(const std::function<void()>& call) {
  constexpr int kMedians = 7, kSamples = 41;
  call();
  const double once_from = now_us();
  call();
  const int calls = std::clamp(static_cast<int>(20 / (now_us() - once_from + 0.01)), 1, 100);
  double best = 1e9;
  for (int m = 0; m < kMedians; ++m) {
    double samples[kSamples];
    for (double& sample : samples) {
      const double from = now_us();
      for (int i = 0; i < calls; ++i) call();
      sample = (now_us() - from) / calls;
    }
    std::nth_element(samples, samples + kSamples / 2, samples + kSamples);
    best = std::min(best, samples[kSamples / 2]);
  }
  return best;
}

template <class W>
W prime_below(W limit, W step) {
  for (W q = limit / step * step + 1 - step;; q -= step) {
    // A test that a bench can do with: 3^(q-1) = 1, and a root of order 2N is found afterwards.
    const Modulus<W> mod(q);
    if (mod.power(3, q - 1) == 1 && mod.power(2, q - 1) == 1) return q;
  }
}

template <class W>
struct Limbs {
  std::size_t n;
  Buffer<W> words;
  Limbs(std::size_t count, std::size_t n_, W q) : n(n_), words(count * n_) {
    u64 x = 1;
    for (std::size_t i = 0; i < words.size(); ++i) {
      x = x * 6364136223846793005u + 1442695040888963407u;
      words[i] = static_cast<W>((x >> 32) % q);
    }
  }
  std::size_t count() const { return words.size() / n; }
  W* operator[](std::size_t i) { return words.data() + i * n; }
};

template <class W>
void bench(const Kernels<W>& k, int log_n) {
  const std::size_t n = std::size_t{1} << log_n;
  const W limit = W{1} << (kBits<W> == 32 ? 30 : 60);
  const W q = prime_below<W>(limit, static_cast<W>(2 * n)),
          other = prime_below<W>(q - 1, static_cast<W>(2 * n));
  const Prime<W> p(q, log_n);
  const Automorphism g(25, log_n);
  Limbs<W> l(8, n, q);
  const W mont = p.mod.one / 3;
  std::printf("%s, %d-bit words, N = %zu\n", k.name, kBits<W>, n);
  const auto line = [&](const char* name, const std::function<void()>& call) {
    std::printf("  %-26s %8.2f\n", name, measure(call));
  };
  line("ntt", [&] { k.ntt(p, l[0], l[1]); });
  line("ntt, in place", [&] { k.ntt(p, l[0], l[0]); });
  line("intt", [&] { k.intt(p, l[0], l[1]); });
  line("permute", [&] { k.permute(g, 0, n, l[0], l[1]); });
  line("permute_add", [&] { k.permute_add(p, g, 0, l[0], l[1]); });
  line("reduce", [&] { k.reduce(p, l[0], l[1]); });
  line("lift_centred", [&] { k.lift_centred(p, l[0], l[1], other); });
  line("add", [&] { k.add(p, l[0], l[1], l[2]); });
  line("sub", [&] { k.sub(p, l[0], l[1], l[2]); });
  line("neg", [&] { k.neg(p, l[0], l[1]); });
  line("mul", [&] { k.mul(p, l[0], l[1], l[2]); });
  line("scale", [&] { k.scale(p, l[0], l[1], mont); });
  line("scale_add", [&] { k.scale_add(p, l[0], l[1], mont); });
  line("sub_scale", [&] { k.sub_scale(p, l[0], l[1], l[2], mont); });
  line("square", [&] { k.square(p, l[0], l[1], l[2], l[3], l[4]); });
  line("tensor", [&] { k.tensor(p, l[0], l[1], l[2], l[3], l[4], l[5], l[6]); });
  line("round_lift", [&] { k.round_lift(p, l[0], l[1], other); });
  line("pair_high", [&] { k.pair_high(p, l[0], l[1], l[2], mont); });
  line("pair_lift", [&] { k.pair_lift(p, l[0], l[1], l[2], other, other, mont); });

  Limbs<W> digits(2 * kMaxTerms, n, q), keys((std::size_t{96} << 20) / sizeof(W) / n, n, q);
  for (std::size_t count : {std::size_t{1}, std::size_t{4}, std::size_t{6}, kMaxTerms}) {
    std::vector<const W*> a, a1, b0, b1;
    for (std::size_t j = 0; j < count; ++j) {
      a.push_back(digits[j]);
      a1.push_back(digits[j + kMaxTerms]);
      b0.push_back(keys[2 * j]);
      b1.push_back(keys[2 * j + 1]);
    }
    std::size_t next = 0;
    const auto advance = [&](std::vector<const W*>& rows) {
      for (const W*& row : rows) row = keys[next++ % keys.count()];
    };
    char name[40];
    std::snprintf(name, sizeof name, "dot_key, %zu", count);
    line(name, [&] { k.dot_key(p, l[0], l[1], a.data(), b0.data(), b1.data(), count, false); });
    std::snprintf(name, sizeof name, "dot_plain, %zu, adding", count);
    line(name, [&] { k.dot_plain(p, l[0], l[1], a.data(), a1.data(), b0.data(), count, true); });
    std::snprintf(name, sizeof name, "dot_key, %zu, streamed", count);
    line(name, [&] {
      advance(b0);
      advance(b1);
      k.dot_key(p, l[0], l[1], a.data(), b0.data(), b1.data(), count, false);
    });
    std::snprintf(name, sizeof name, "dot_plain, %zu, streamed", count);
    line(name, [&] {
      advance(b0);
      k.dot_plain(p, l[0], l[1], a.data(), a1.data(), b0.data(), count, true);
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<const char*> names(argv + 1, argv + argc);
  if (names.empty()) names = {"avx512", "avx2", "portable"};
  for (int log_n : {12, 13, 14}) {
    for (const char* name : names) {
      try {
        bench(kernels<u32>(name), log_n);
      } catch (const std::invalid_argument& e) {
        std::printf("%s: %s\n", name, e.what());
      }
    }
    if (argc == 1) bench(kernels<u64>(), log_n);
  }
  return 0;
}
