// BLAKE2b (RFC 7693) and the output nodes of BLAKE2Xb, on a vector of states: one in each lane.
//
// Templates over a lane type L of the including file's unnamed namespace, so that code for
// one instruction set is never merged with another's:
//   L::Vec, L::kLanes, L::all(u64), L::load(const u64*), L::add, L::exclusive_or, L::rotate<k>
//   L::store_states(const Vec h[8], u64* out): lane by lane, the 8 words of each
#pragma once

#include <cstddef>

#include "modular.hpp"

namespace blindtail::blake2b {

inline constexpr std::size_t kBlockBytes = 4096, kBlockWords = kBlockBytes / 8;
inline constexpr std::size_t kLeaves = kBlockBytes / 64;

inline constexpr u64 kInitial[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                                    0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                                    0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

inline constexpr std::uint8_t kOrder[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                                {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                                {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                                {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                                {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                                {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                                {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                                {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                                {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                                {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

// Parameter words. Root: 64 bytes of digest and key, fan-out and depth 1, output length above the
// node offset. Leaf i: 64 bytes of digest, leaves of 64 bytes, node offset i, inner length 64.
inline constexpr u64 kRoot0 = 64 | 64u << 8 | 1u << 16 | 1u << 24, kRoot1 = u64{kBlockBytes} << 32;
inline constexpr u64 kLeaf0 = 64 | u64{64} << 32, kLeaf1 = u64{kBlockBytes} << 32, kLeaf2 = 64u << 8;

#define BLINDTAIL_INLINE inline __attribute__((always_inline))

/// One compression. M::kWords: words of the message from there on are zero; m.word<i>() is word i.
template <class L, class M>
struct Compression {
  using V = typename L::Vec;
  V v[16];

  template <int X>
  BLINDTAIL_INLINE void take(V& a, const M& m) {
    if constexpr (X < M::kWords) a = L::add(a, m.template word<X>());
  }
  template <int X, int Y>
  BLINDTAIL_INLINE void mix(V& a, V& b, V& c, V& d, const M& m) {
    a = L::add(a, b);
    take<X>(a, m);
    d = L::template rotate<32>(L::exclusive_or(d, a));
    c = L::add(c, d);
    b = L::template rotate<24>(L::exclusive_or(b, c));
    a = L::add(a, b);
    take<Y>(a, m);
    d = L::template rotate<16>(L::exclusive_or(d, a));
    c = L::add(c, d);
    b = L::template rotate<63>(L::exclusive_or(b, c));
  }
  template <int R>
  BLINDTAIL_INLINE void round(const M& m) {
    constexpr auto& s = kOrder[R % 10];
    mix<s[0], s[1]>(v[0], v[4], v[8], v[12], m);
    mix<s[2], s[3]>(v[1], v[5], v[9], v[13], m);
    mix<s[4], s[5]>(v[2], v[6], v[10], v[14], m);
    mix<s[6], s[7]>(v[3], v[7], v[11], v[15], m);
    mix<s[8], s[9]>(v[0], v[5], v[10], v[15], m);
    mix<s[10], s[11]>(v[1], v[6], v[11], v[12], m);
    mix<s[12], s[13]>(v[2], v[7], v[8], v[13], m);
    mix<s[14], s[15]>(v[3], v[4], v[9], v[14], m);
  }
  /// h <- the state after `bytes` bytes in all, the last of them in this message if `last`.
  BLINDTAIL_INLINE void run(V h[8], const M& m, u64 bytes, bool last) {
    for (int i = 0; i < 8; ++i) {
      v[i] = h[i];
      v[i + 8] = L::all(kInitial[i]);
    }
    v[12] = L::all(kInitial[4] ^ bytes);
    if (last) v[14] = L::all(~kInitial[6]);
    round<0>(m), round<1>(m), round<2>(m), round<3>(m), round<4>(m), round<5>(m);
    round<6>(m), round<7>(m), round<8>(m), round<9>(m), round<10>(m), round<11>(m);
    for (int i = 0; i < 8; ++i) h[i] = L::exclusive_or(h[i], L::exclusive_or(v[i], v[i + 8]));
  }
};

/// A message of the same `Words` words in every lane, the rest zero.
template <class L, int Words>
struct Shared {
  static constexpr int kWords = Words;
  const u64* words;
  template <int I>
  BLINDTAIL_INLINE typename L::Vec word() const {
    return L::all(words[I]);
  }
};

/// A message of one word, its own in each lane, the rest zero.
template <class L>
struct Single {
  static constexpr int kWords = 1;
  typename L::Vec only;
  template <int>
  BLINDTAIL_INLINE typename L::Vec word() const {
    return only;
  }
};

/// Blocks first, first + 1, ... of the stream whose state after its key is `keyed`: 512 words each.
template <class L>
inline void blocks(const u64 keyed[8], u64 first, std::size_t count, u64* out) {
  using V = typename L::Vec;
  constexpr std::size_t kLanes = L::kLanes;
  static_assert(kLeaves % kLanes == 0);
  alignas(64) u64 index[kLeaves], roots[8 * kLanes];
  for (std::size_t i = 0; i < kLeaves; ++i) index[i] = i;
  for (std::size_t done = 0; done < count; done += kLanes) {
    // The root hashes of this many blocks at once: key (128 bytes, common) and counter (8 bytes).
    V h[8];
    for (int i = 0; i < 8; ++i) h[i] = L::all(keyed[i]);
    const Single<L> counters{L::add(L::all(first + done), L::load(index))};
    Compression<L, Single<L>>().run(h, counters, 128 + 8, true);
    L::store_states(h, roots);
    for (std::size_t b = 0; b < kLanes && done + b < count; ++b) {
      const Shared<L, 8> root{roots + 8 * b};
      for (std::size_t leaf = 0; leaf < kLeaves; leaf += kLanes) {
        for (int i = 0; i < 8; ++i) h[i] = L::all(kInitial[i]);
        h[0] = L::all(kInitial[0] ^ kLeaf0);
        h[1] = L::exclusive_or(L::all(kInitial[1] ^ kLeaf1), L::load(index + leaf));
        h[2] = L::all(kInitial[2] ^ kLeaf2);
        Compression<L, Shared<L, 8>>().run(h, root, 64, true);
        L::store_states(h, out + (done + b) * kBlockWords + 8 * leaf);
      }
    }
  }
}

}  // namespace blindtail::blake2b
