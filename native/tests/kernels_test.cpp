// Every kernel of every instruction set this processor has, against its definition written with %.
#include "kernels.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using namespace blindtail;

namespace {

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

// Sanitizers make everything ten times as slow. Beyond 2^12 they see transforms alone: what goes word by word
// has then nothing new.
#ifdef BLINDTAIL_SANITIZED
constexpr int kWholeLog = 12;
#else
constexpr int kWholeLog = 16;
#endif

std::mt19937_64 generator(20240229);

template <class W>
bool is_prime(W q) {
  if (q < 3 || q % 2 == 0) return false;
  const Modulus<W> mod(q);
  for (W base : {2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37}) {
    if (base % q == 0) continue;
    W d = q - 1;
    int twos = 0;
    for (; d % 2 == 0; d /= 2) ++twos;
    W x = mod.power(base, d);
    bool passes = x == 1 || x == q - 1;
    for (int i = 1; i < twos && !passes; ++i) {
      x = mod.mul(x, mod.to_montgomery(x));
      passes = x == q - 1;
    }
    if (!passes) return false;
  }
  return true;
}

/// The first prime = 1 mod 2n at or after `from`, or before it.
template <class W>
W find_prime(W from, W n, bool upwards) {
  W q = from / (2 * n) * (2 * n) + 1;
  while (!is_prime(q)) q = upwards ? q + 2 * n : q - 2 * n;
  return q;
}

/// Random words below `bound`, the ends often among them.
template <class W>
Buffer<W> words(std::size_t n, W bound) {
  Buffer<W> out(n);
  const bool edges_only = generator() % 4 == 0;
  for (std::size_t i = 0; i < n; ++i) {
    const u64 r = generator();
    out[i] = r % 8 == 0 ? 0 : (r % 8 < 3 || edges_only) ? bound - 1 : static_cast<W>(generator() % bound);
  }
  return out;
}

template <class W>
Buffer<W> copy(const Buffer<W>& from) {
  Buffer<W> out(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) out[i] = from[i];
  return out;
}

template <class W>
void same(const Buffer<W>& got, const Buffer<W>& wanted, const std::string& what) {
  for (std::size_t i = 0; i < wanted.size(); ++i)
    CHECK(got[i] == wanted[i], "%s, word %zu: %llu, not %llu", what.c_str(), i,
          static_cast<unsigned long long>(got[i]), static_cast<unsigned long long>(wanted[i]));
}

template <class W>
struct Tester {
  const Prime<W>& p;
  const Kernels<W>& k;
  const Kernels<W>& plain = portable_kernels<W>();
  W q = p.mod.q;
  std::size_t n = p.n;

  std::string name(const char* kernel) const {
    return std::string(k.name) + " " + kernel + ", q = " + std::to_string(q) + ", n = " + std::to_string(n);
  }

  W times(W a, W b) const { return static_cast<W>(static_cast<u128>(a) * b % q); }
  W plus(W a, W b) const { return static_cast<W>((static_cast<u128>(a) + b) % q); }
  W minus(W a, W b) const { return plus(a, q - b % q); }

  /// call(out, in) against definition(i), fresh and in place where that is allowed.
  template <class Call, class Definition>
  void pointwise(const char* kernel, const Buffer<W>& in, bool in_place, Call call,
                 Definition definition) const {
    Buffer<W> wanted(n), got(n);
    for (std::size_t i = 0; i < n; ++i) wanted[i] = definition(i);
    call(got.data(), in.data());
    same(got, wanted, name(kernel));
    if (!in_place) return;
    Buffer<W> both = copy(in);
    call(both.data(), both.data());
    same(both, wanted, name(kernel) + ", in place");
  }

  /// Words below 4q that are congruent to the definition, and those of the portable table.
  template <class Call, class Definition>
  void lazy(const char* kernel, Call call, Definition definition) const {
    Buffer<W> got(n), wanted(n);
    call(k, got.data());
    call(plain, wanted.data());
    same(got, wanted, name(kernel));
    for (std::size_t i = 0; i < n; ++i)
      CHECK(got[i] < 4 * q && got[i] % q == definition(i), "%s, word %zu", name(kernel).c_str(), i);
  }

  void transforms() const {
    const Buffer<W> a = words<W>(n, 4 * q);
    Buffer<W> canonical(n), wanted(n);
    for (std::size_t i = 0; i < n; ++i) canonical[i] = a[i] % q;
    plain.ntt(p, wanted.data(), canonical.data());
    pointwise(
        "ntt", a, true, [&](W* out, const W* in) { k.ntt(p, out, in); },
        [&](std::size_t i) { return wanted[i]; });
    pointwise(
        "intt", wanted, true, [&](W* out, const W* in) { k.intt(p, out, in); },
        [&](std::size_t i) { return canonical[i]; });
    const Buffer<W> any = words<W>(n, q);
    plain.intt(p, wanted.data(), any.data());
    pointwise(
        "intt", any, true, [&](W* out, const W* in) { k.intt(p, out, in); },
        [&](std::size_t i) { return wanted[i]; });
  }

  /// A product of polynomials modulo X^n + 1, by the definition.
  void schoolbook() const {
    const Buffer<W> a = words<W>(n, q), b = words<W>(n, q);
    Buffer<W> wanted(n), x(n), y(n);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < n; ++j) {
        W& at = wanted[(i + j) % n];
        at = i + j < n ? plus(at, times(a[i], b[j])) : minus(at, times(a[i], b[j]));
      }
    k.ntt(p, x.data(), a.data());
    k.ntt(p, y.data(), b.data());
    k.mul(p, x.data(), x.data(), y.data());
    k.intt(p, x.data(), x.data());
    same(x, wanted, name("negacyclic product"));
  }

  void arithmetic() const {
    const Buffer<W> a = words<W>(n, q), b = words<W>(n, q), c = words<W>(n, q), d = words<W>(n, q);
    const Buffer<W> lazy4 = words<W>(n, 4 * q), any = words<W>(n, static_cast<W>(~W{0}));
    const W mont = words<W>(32, q)[generator() % 32], factor = p.mod.from_montgomery(mont);
    pointwise(
        "reduce", any, true, [&](W* out, const W* in) { k.reduce(p, out, in); },
        [&](std::size_t i) { return any[i] % q; });
    pointwise(
        "add", a, true, [&](W* out, const W* in) { k.add(p, out, in, b.data()); },
        [&](std::size_t i) { return plus(a[i], b[i]); });
    pointwise(
        "sub", a, true, [&](W* out, const W* in) { k.sub(p, out, in, b.data()); },
        [&](std::size_t i) { return minus(a[i], b[i]); });
    pointwise(
        "neg", a, true, [&](W* out, const W* in) { k.neg(p, out, in); },
        [&](std::size_t i) { return minus(0, a[i]); });
    pointwise(
        "mul", a, true, [&](W* out, const W* in) { k.mul(p, out, in, b.data()); },
        [&](std::size_t i) { return times(a[i], b[i]); });
    pointwise(
        "scale", lazy4, true, [&](W* out, const W* in) { k.scale(p, out, in, mont); },
        [&](std::size_t i) { return times(lazy4[i], factor); });
    pointwise(
        "sub_scale", a, true, [&](W* out, const W* in) { k.sub_scale(p, out, in, lazy4.data(), mont); },
        [&](std::size_t i) { return times(minus(a[i], lazy4[i]), factor); });
    pointwise(
        "scale_add", a, false,
        [&](W* out, const W* in) {
          k.add(p, out, in, b.data());
          k.scale_add(p, out, in, mont);
        },
        [&](std::size_t i) { return plus(plus(a[i], b[i]), times(a[i], factor)); });
    Buffer<W> d0(n), d1(n), d2(n);
    k.tensor(p, d0.data(), d1.data(), d2.data(), a.data(), b.data(), c.data(), d.data());
    for (std::size_t i = 0; i < n; ++i)
      CHECK(d0[i] == times(a[i], c[i]) && d1[i] == plus(times(a[i], d[i]), times(b[i], c[i])) &&
                d2[i] == times(b[i], d[i]),
            "%s, word %zu", name("tensor").c_str(), i);
    k.square(p, d0.data(), d1.data(), d2.data(), a.data(), b.data());
    for (std::size_t i = 0; i < n; ++i)
      CHECK(d0[i] == times(a[i], a[i]) && d1[i] == times(2, times(a[i], b[i])) && d2[i] == times(b[i], b[i]),
            "%s, word %zu", name("square").c_str(), i);
  }

  void dots() const {
    for (std::size_t count = 1; count <= kMaxTerms; ++count)
      for (bool accumulate : {false, true}) {
        std::vector<Buffer<W>> rows;
        std::vector<const W*> a, b, c;
        for (std::size_t j = 0; j < 3 * count; ++j) {
          rows.push_back(words<W>(n, q));
          // The largest sum there is, twice.
          if (count == kMaxTerms)
            for (std::size_t i = 0; i < n; i += 3) rows.back()[i] = q - 1;
          (j < count ? a : j < 2 * count ? b : c).push_back(rows.back().data());
        }
        const Buffer<W> before0 = words<W>(n, q), before1 = words<W>(n, q);
        Buffer<W> shared0(n), shared1(n);
        const auto dot = [&](const std::vector<const W*>& x, const std::vector<const W*>& y, W start,
                             std::size_t i) {
          W sum = accumulate ? start : 0;
          for (std::size_t j = 0; j < count; ++j)
            sum = plus(sum, times(x[j][i], p.mod.from_montgomery(y[j][i])));
          return sum;
        };
        Buffer<W> out0 = copy(before0), out1 = copy(before1);
        k.dot_key(p, out0.data(), out1.data(), a.data(), b.data(), c.data(), count, accumulate);
        for (std::size_t i = 0; i < n; ++i)
          CHECK(out0[i] == dot(a, b, before0[i], i) && out1[i] == dot(a, c, before1[i], i),
                "%s, %zu terms, word %zu", name("dot_key").c_str(), count, i);
        out0 = copy(before0);
        out1 = copy(before1);
        k.dot_plain(p, out0.data(), out1.data(), a.data(), b.data(), c.data(), count, accumulate);
        for (std::size_t i = 0; i < n; ++i)
          CHECK(out0[i] == dot(a, c, before0[i], i) && out1[i] == dot(b, c, before1[i], i),
                "%s, %zu terms, word %zu", name("dot_plain").c_str(), count, i);
      }
  }

  /// X -> X^g on coefficients: X^i becomes X^(g i mod 2n), and X^n is -1.
  void automorphisms() const {
    const u32 mask = static_cast<u32>(2 * n - 1);
    for (u32 g :
         {u32{1}, u32{3}, u32{5}, mask, static_cast<u32>(generator()) & mask, (u32{1} << 31 | 25) & mask}) {
      g |= 1;
      const Automorphism map(g, p.log_n);
      const Buffer<W> a = words<W>(n, q), before = words<W>(n, q);
      Buffer<W> wanted(n), in(n), out(n);
      for (std::size_t i = 0; i < n; ++i) {
        const u64 at = static_cast<u64>(g) * i % (2 * n);
        wanted[at % n] = at < n ? a[i] : minus(0, a[i]);
      }
      plain.ntt(p, wanted.data(), wanted.data());
      plain.ntt(p, in.data(), a.data());
      Buffer<W> sum(n);
      for (std::size_t i = 0; i < n; ++i) sum[i] = plus(wanted[i], before[i]);
      // A block comes from one block alone: nothing else is given.
      for (std::size_t block = n; block >= 32; block /= 4) {
        out = Buffer<W>(n);
        Buffer<W> added = copy(before), part(block), from(block);
        for (std::size_t first = 0; first < n; first += block) {
          const std::size_t source = map.source(first, block);
          CHECK(source % block == 0 && source < n, "%s, block of %zu", name("source").c_str(), block);
          std::copy_n(in.data() + source, block, from.data());
          k.permute(map, first, block, part.data(), from.data());
          std::copy_n(part.data(), block, out.data() + first);
          k.permute_add({p, block}, map, first, added.data() + first, from.data());
        }
        same(out, wanted, name("permute"));
        same(added, sum, name("permute_add"));
      }
    }
  }

  /// Words modulo another odd number `other` (primes in use, but nothing here needs that).
  void other_primes(W other) const {
    const W mont = words<W>(32, q)[generator() % 32], factor = p.mod.from_montgomery(mont);
    const Buffer<W> y = words<W>(n, other), x = words<W>(n, q);
    const auto centred = [&](W v, W modulus) {
      return v > modulus / 2 ? minus(0, (modulus - v) % q) : v % q;
    };
    if (other < 2 * q)
      lazy(
          "lift_centred", [&](const Kernels<W>& t, W* out) { t.lift_centred(p, out, y.data(), other); },
          [&](std::size_t i) { return centred(y[i], other); });
    lazy(
        "round_lift", [&](const Kernels<W>& t, W* out) { t.round_lift(p, out, y.data(), other); },
        [&](std::size_t i) {
          const W sum = static_cast<W>((static_cast<u128>(y[i]) + other / 2) % other);
          return minus(sum % q, other / 2);
        });
    if (other < 4 * q)
      pointwise(
          "pair_high", x, false, [&](W* out, const W* in) { k.pair_high(p, out, in, y.data(), mont); },
          [&](std::size_t i) { return times(minus(x[i], y[i]), factor); });
    // `other` as both the last prime and the special one.
    const Buffer<W> h = words<W>(n, other);
    const W last_mont = p.mod.to_montgomery(other % q);
    lazy(
        "pair_lift",
        [&](const Kernels<W>& t, W* out) {
          t.pair_lift(p, out, y.data(), h.data(), other, other, last_mont);
        },
        [&](std::size_t i) { return plus(y[i] % q, times(other % q, centred(h[i], other))); });
  }

  void all() const {
    transforms();
    if (p.log_n > kWholeLog) return;
    if (n <= 256) schoolbook();
    for (int i = 0; i < 4; ++i) arithmetic();
    dots();
    automorphisms();
    const W limit = W{1} << (kBits<W> - 2);
    other_primes(q);
    for (W other : {q / 2, q / 3 * 2, q / 2 * 3, 2 * q - 2, 4 * q - 2, limit - 1, W{3}}) {
      other |= 1;
      if (other < limit && (other < 4 * q || kBits<W> == 64)) other_primes(other);
    }
  }
};

template <class W>
void test_words(const std::vector<const char*>& names) {
  for (int log : {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16}) {
    const W n = W{1} << log, limit = W{1} << (kBits<W> == 32 ? 30 : 60);
    std::vector<W> primes = {find_prime<W>(limit - 2 * n, n, false), find_prime<W>(2 * n, n, true)};
    if (log <= 13)
      primes.push_back(find_prime<W>(static_cast<W>(generator() % (limit / 2)) + 2 * n, n, true));
    if (log > 13) primes.resize(1);
    for (W q : primes) {
      const Prime<W> p(q, log);
      for (const char* name : names) Tester<W>{p, kernels<W>(name)}.all();
    }
  }
}

template <class Call>
bool refuses(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  std::vector<const char*> names;
  for (const char* name : {"avx512", "avx2", "portable"}) {
    if (refuses([&] { kernels<u32>(name); })) continue;
    CHECK(kernels<u32>(name).name == std::string(name), "%s", name);
    names.push_back(name);
  }
  CHECK(!names.empty() && names.back() == std::string("portable"), "the portable table is always there");
  CHECK(&kernels<u32>() == &kernels<u32>(names.front()), "the best is chosen");
  CHECK(refuses([] { kernels<u32>("mmx"); }), "an unknown name");
  CHECK(refuses([] { kernels<u64>("avx2"); }) && &kernels<u64>() == &portable_kernels<u64>(), "64-bit words");
  test_words<u32>(names);
  test_words<u64>({"portable"});
  std::string list;
  for (const char* name : names) list += std::string(" ") + name;
  std::printf("kernels: ok (%s )\n", list.c_str());
  return 0;
}
