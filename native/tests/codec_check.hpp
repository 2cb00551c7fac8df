// What the tests of seeds, packing, bodies and encoding share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "codec_kernels.hpp"

namespace blindtail {

/// Those that this processor has.
inline std::vector<const CodecKernels*> tables() {
  std::vector<const CodecKernels*> found;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    try {
      found.push_back(&codec_kernels(name));
    } catch (const std::invalid_argument&) {
      std::printf("no %s here\n", name);
    }
  }
  return found;
}

/// A hash of words for known answers (FNV-1a on whole words).
template <class W>
u64 hash(const W* words, std::size_t n) {
  u64 h = 0xcbf29ce484222325;
  for (std::size_t i = 0; i < n; ++i) h = (h ^ words[i]) * 0x100000001b3;
  return h;
}

inline std::vector<std::uint8_t> hex(const std::string& text) {
  std::vector<std::uint8_t> out;
  for (std::size_t i = 0; i < text.size(); i += 2)
    out.push_back(static_cast<std::uint8_t>(std::stoul(text.substr(i, 2), nullptr, 16)));
  return out;
}

/// A heap block of the exact size, so that AddressSanitizer sees one byte too many.
inline std::unique_ptr<std::uint8_t[]> exact(const std::vector<std::uint8_t>& bytes) {
  std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[bytes.size()]);
  std::copy(bytes.begin(), bytes.end(), out.get());
  return out;
}

/// `count` polynomials of n words and pointers to them.
template <class W>
struct Limbs {
  std::vector<std::vector<W>> words;
  std::vector<W*> rows;
  Limbs(std::size_t count, std::size_t n) : words(count, std::vector<W>(n)) {
    for (auto& one : words) rows.push_back(one.data());
  }
};

}  // namespace blindtail
