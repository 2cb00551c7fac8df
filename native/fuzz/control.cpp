// Positive control of driver.cpp: a planted fault behind four conditions. Each opens a branch of its own, so
// that coverage finds them one by one; blind mutation would have to meet all at once, one input in 2^32.
// See cmake/check_driver.cmake.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

volatile int reached = 0;  // keeps the branches apart

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 8) return 0;
  if (data[0] != 'b') return 0;
  reached = 1;
  if (data[5] != 0x91) return 0;
  reached = 2;
  if (data[2] + data[3] != 400) return 0;
  reached = 3;
  if (data[7] != (data[2] ^ 0x37)) return 0;
  std::fprintf(stderr, "the planted fault\n");
  std::abort();
}
