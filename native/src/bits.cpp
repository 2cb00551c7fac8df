#include "bits.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace blindtail {
namespace {

static_assert(std::endian::native == std::endian::little, "wire formats are read as machine words");

template <class W>
void check_width(std::size_t count, int width) {
  if (width < 1 || width > std::min(kMaxWidth, kBits<W>) || count >> 32 != 0)
    throw std::invalid_argument("a bit width is outside its word");
}

/// The 64 bits from bit `shift` < 8 of at[0 ... 8].
inline u64 window(const std::uint8_t* at, unsigned shift) {
  u64 low;
  std::memcpy(&low, at, 8);
  return low >> shift | (u64{at[8]} << 1) << (63 - shift);
}

/// The same from at[0 ... 7]: right for widths up to 57.
inline u64 short_window(const std::uint8_t* at, unsigned shift) {
  u64 low;
  std::memcpy(&low, at, 8);
  return low >> shift;
}

/// Values [begin, end), all of whose windows lie within `data`.
template <class W, u64 (*Window)(const std::uint8_t*, unsigned)>
bool unpack_inside(const std::uint8_t* data, std::size_t begin, std::size_t end, unsigned width, W most,
                   W* out) {
  const u64 mask = (u64{1} << width) - 1;
  W over = 0;
  u64 bit = u64{begin} * width;
  for (std::size_t i = begin; i < end; ++i, bit += width) {
    const W value = static_cast<W>(Window(data + (bit >> 3), bit & 7) & mask);
    out[i] = value;
    over |= value > most;
  }
  return over == 0;
}

}  // namespace

template <class W>
void pack_bits(const W* values, std::size_t count, std::size_t stride, int drop, int width,
               std::uint8_t* out) {
  check_width<W>(count, width);
  const u64 mask = (u64{1} << width) - 1;
  u64 pending = 0;  // `filled` < 64 bits wait
  int filled = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const u64 value = static_cast<u64>(values[i * stride]) >> drop & mask;
    pending |= value << filled;
    filled += width;
    if (filled < 64) continue;
    std::memcpy(out, &pending, 8);
    out += 8;
    filled -= 64;
    pending = filled == 0 ? 0 : value >> (width - filled);
  }
  if (filled != 0) std::memcpy(out, &pending, static_cast<std::size_t>(filled + 7) / 8);
}

template <class W>
bool unpack_bits(std::span<const std::uint8_t> data, std::size_t count, int width, W bound, W* out,
                 const CodecKernels& kernels) {
  check_width<W>(count, width);
  if (data.size() != packed_bytes(count, width)) return false;
  if (count == 0) return true;
  if (bound == 0) return false;
  const unsigned step = static_cast<unsigned>(width);
  const W most = bound - 1;
  bool good = true;
  std::size_t done = 0;
  if constexpr (std::is_same_v<W, u32>)
    done = kernels.unpack(data.data(), data.size(), count, width, most, out, &good);
  // Whole windows of 9 bytes: value i starts at or before byte size - 9.
  const std::size_t whole = data.size() < 9 ? 0 : (8 * (data.size() - 9) + 7) / step + 1;
  const std::size_t end = std::max(done, std::min(count, whole));
  good &= step <= 57 ? unpack_inside<W, short_window>(data.data(), done, end, step, most, out)
                     : unpack_inside<W, window>(data.data(), done, end, step, most, out);
  // The others from a copy with zeros behind it: at most 9 bytes, as value `end` starts among the last 8.
  if (end < count) {
    std::uint8_t copy[24] = {};
    const std::size_t from = end * step / 8;
    std::memcpy(copy, data.data() + from, data.size() - from);
    const u64 mask = (u64{1} << step) - 1;
    for (std::size_t i = end; i < count; ++i) {
      const std::size_t bit = i * step - 8 * from;
      const W value = static_cast<W>(window(copy + bit / 8, bit % 8) & mask);
      out[i] = value;
      good &= value <= most;
    }
  }
  const std::size_t spare = 8 * data.size() - count * step;
  return good && (spare == 0 || data.back() >> (8 - spare) == 0);
}

template void pack_bits<u32>(const u32*, std::size_t, std::size_t, int, int, std::uint8_t*);
template void pack_bits<u64>(const u64*, std::size_t, std::size_t, int, int, std::uint8_t*);
template bool unpack_bits<u32>(std::span<const std::uint8_t>, std::size_t, int, u32, u32*,
                               const CodecKernels&);
template bool unpack_bits<u64>(std::span<const std::uint8_t>, std::size_t, int, u64, u64*,
                               const CodecKernels&);

}  // namespace blindtail
