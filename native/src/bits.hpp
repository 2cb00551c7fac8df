// Bit packing: residues travel at exactly the width of their prime (see blindtail/he/packing.py).
//
// Little-endian: value i occupies bits [i * width, (i + 1) * width) of the byte string, bit 0
// of a byte first. Unused bits of the last byte are zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "codec_kernels.hpp"

namespace blindtail {

inline constexpr int kMaxWidth = 60;

/// Bytes that `count` values of `width` bits take; count < 2^32.
constexpr std::size_t packed_bytes(std::size_t count, int width) {
  return (count * static_cast<std::size_t>(width) + 7) / 8;
}

/// Writes packed_bytes(count, width) bytes of values[0], values[stride], ... without their lowest `drop`
/// bits; what is above the width is cut. 1 <= width <= 60 and <= the word, or std::invalid_argument.
template <class W>
void pack_bits(const W* values, std::size_t count, std::size_t stride, int drop, int width,
               std::uint8_t* out);

/// False, with `out` undefined, unless `data` has exactly packed_bytes(count, width) bytes, every value
/// is below `bound` and the padding bits are zero. 1 <= width <= 60 and <= the word, or
/// std::invalid_argument.
template <class W>
bool unpack_bits(std::span<const std::uint8_t> data, std::size_t count, int width, W bound, W* out,
                 const CodecKernels& kernels = codec_kernels());

extern template void pack_bits<u32>(const u32*, std::size_t, std::size_t, int, int, std::uint8_t*);
extern template void pack_bits<u64>(const u64*, std::size_t, std::size_t, int, int, std::uint8_t*);
extern template bool unpack_bits<u32>(std::span<const std::uint8_t>, std::size_t, int, u32, u32*,
                                      const CodecKernels&);
extern template bool unpack_bits<u64>(std::span<const std::uint8_t>, std::size_t, int, u64, u64*,
                                      const CodecKernels&);

}  // namespace blindtail
