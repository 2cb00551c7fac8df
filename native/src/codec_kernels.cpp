// CodecKernels in plain C++, and which table this processor runs.
#include "codec_kernels.hpp"

#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "blake2b.hpp"

namespace blindtail {
namespace {
namespace portable {

struct Lanes {
  using Vec = u64;
  static constexpr std::size_t kLanes = 1;
  static u64 all(u64 x) { return x; }
  static u64 load(const u64* p) { return *p; }
  static u64 add(u64 a, u64 b) { return a + b; }
  static u64 exclusive_or(u64 a, u64 b) { return a ^ b; }
  template <int K>
  static u64 rotate(u64 a) {
    return a >> K | a << (64 - K);
  }
  static void store_states(const u64 h[8], u64* out) {
    for (int i = 0; i < 8; ++i) out[i] = h[i];
  }
};

bool any_at_least(const u64* in, std::size_t n, u64 bound) {
  bool any = false;
  for (std::size_t i = 0; i < n; ++i) any |= in[i] >= bound;
  return any;
}

void reduce(const Modulus<u32>& m, u64 offset, const u64* in, std::size_t n, u32* out) {
  // floor(x / q) or one less: Barrett's quotient with floor(2^64 / q).
  const u64 q = m.q, ratio = ~u64{0} / q;
  for (std::size_t i = 0; i < n; ++i) {
    const u64 x = in[i] + offset;
    out[i] = static_cast<u32>(reduce_once<u64>(x - mul_high<u64>(x, ratio) * q, q));
  }
}

std::size_t unpack(const std::uint8_t*, std::size_t, std::size_t, int, u32, u32*, bool*) { return 0; }

}  // namespace portable

struct Choice {
  const char* name;
  bool available;
  const CodecKernels& (*table)();
};

}  // namespace

static_assert(std::endian::native == std::endian::little, "wire formats are read as machine words");

void keyed_state(const std::uint8_t key[64], u64 state[8]) {
  u64 words[8];
  std::memcpy(words, key, sizeof words);
  for (int i = 0; i < 8; ++i) state[i] = blake2b::kInitial[i];
  state[0] ^= blake2b::kRoot0;
  state[1] ^= blake2b::kRoot1;
  const blake2b::Shared<portable::Lanes, 8> message{words};
  blake2b::Compression<portable::Lanes, blake2b::Shared<portable::Lanes, 8>>().run(state, message, 128,
                                                                                   false);
}

const CodecKernels& portable_codec() {
  static const CodecKernels table{"portable", blake2b::blocks<portable::Lanes>, portable::any_at_least,
                                  portable::reduce, portable::unpack};
  return table;
}

const CodecKernels& codec_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const Choice list[] = {
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"),
       avx512_codec},
      {"avx2", __builtin_cpu_supports("avx2") != 0, avx2_codec},
      {"portable", true, portable_codec},
  };
#else
  static const Choice list[] = {{"portable", true, portable_codec}};
#endif
  for (const Choice& choice : list)
    if (choice.available && (name == nullptr || std::string_view(name) == choice.name)) return choice.table();
  throw std::invalid_argument("no codec kernels \"" + std::string(name) + "\" on this processor");
}

}  // namespace blindtail
