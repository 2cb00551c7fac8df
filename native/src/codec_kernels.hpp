// The inner loops of seeds, bit packing and encoding: one table for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "modular.hpp"

namespace blindtail {

struct CodecKernels {
  const char* name;
  /// Blocks first, first + 1, ... of a BLAKE2Xb stream, 512 words each; `keyed` is the state after the key.
  void (*blocks)(const u64 keyed[8], u64 first, std::size_t count, u64* out);
  /// Whether a word is >= bound; any n.
  bool (*any_at_least)(const u64* in, std::size_t n, u64 bound);
  /// out = (in + offset) mod q, the sum modulo 2^64; any n; q odd and below 2^30.
  void (*reduce)(const Modulus<u32>& m, u64 offset, const u64* in, std::size_t n, u32* out);
  /// Unpacks a prefix of `count` values of `width` <= 32 bits, reading nothing past `bytes`; returns how
  /// many (a multiple of 8, perhaps 0). Clears *good when one is above `most`.
  std::size_t (*unpack)(const std::uint8_t* data, std::size_t bytes, std::size_t count, int width, u32 most,
                        u32* out, bool* good);
};

/// The best of what this processor has, or the one named: "avx512", "avx2", "portable".
/// Throws std::invalid_argument when the processor lacks it.
const CodecKernels& codec_kernels(const char* name = nullptr);

/// The state of a BLAKE2Xb stream with 4096-byte blocks after its 64-byte key.
void keyed_state(const std::uint8_t key[64], u64 state[8]);

const CodecKernels& portable_codec();
const CodecKernels& avx2_codec();    // only where codec_avx2.cpp is compiled
const CodecKernels& avx512_codec();  // only where codec_avx512.cpp is compiled

}  // namespace blindtail
