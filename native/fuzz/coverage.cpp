#include "coverage.hpp"

#include <algorithm>
#include <array>

namespace {

constexpr int kSlotBits = 18;
constexpr std::size_t kSlots = std::size_t{1} << kSlotBits;

/// Edges of the input tried now: how often each was passed (up to 255), and which at all.
struct Trail {
  std::uint8_t hits[kSlots];
  std::uint32_t touched[kSlots];
  std::size_t count;
  std::uint64_t before;
  bool recording;
};
Trail trail;

/// 1, 2, 3, 4 ... 7, 8 ... 15, 16 ... 31, 32 ... 127, more.
std::uint8_t bucket(unsigned hits) {
  static constexpr std::array<unsigned, 8> kLast{1, 2, 3, 7, 15, 31, 127, 255};
  return static_cast<std::uint8_t>(1u
                                   << (std::lower_bound(kLast.begin(), kLast.end(), hits) - kLast.begin()));
}

}  // namespace

/// Called by instrumented code. Nothing in here is checked or instrumented itself.
extern "C" __attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc() {
  if (!trail.recording) return;
  // Addresses count from this function, so that they do not depend on where the program was loaded.
  const std::uint64_t pc = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)) -
                           reinterpret_cast<std::uintptr_t>(&__sanitizer_cov_trace_pc);
  const std::uint64_t here = (pc * 0x9e3779b97f4a7c15u) >> (64 - kSlotBits);
  const std::uint64_t slot = here ^ trail.before;
  trail.before = here >> 1;  // shifted: A to B is another edge than B to A
  if (trail.hits[slot] == 0) trail.touched[trail.count++] = static_cast<std::uint32_t>(slot);
  if (trail.hits[slot] != 255) ++trail.hits[slot];
}

namespace fuzz {

Coverage::Coverage(bool wanted) : seen_(kSlots), wanted_(wanted) {}

void Coverage::begin() {
  trail.before = 0;
  trail.recording = wanted_;
}

bool Coverage::end() {
  trail.recording = false;
  bool fresh = false;
  for (std::size_t i = 0; i < trail.count; ++i) {
    const std::uint32_t slot = trail.touched[i];
    const std::uint8_t bit = bucket(trail.hits[slot]);
    trail.hits[slot] = 0;
    if (seen_[slot] & bit) continue;
    if (seen_[slot] == 0) ++edges_;
    seen_[slot] |= bit;
    ++features_;
    fresh = true;
  }
  trail.count = 0;
  return fresh;
}

}  // namespace fuzz
