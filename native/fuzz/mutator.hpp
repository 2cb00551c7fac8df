// Inputs to keep, and new ones made from them (see driver.cpp).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace fuzz {

using Bytes = std::vector<std::uint8_t>;

/// Copies of inputs with a few changes each.
class Mutator {
 public:
  struct Entry {
    Bytes bytes;
    std::uint64_t picked = 0;
  };

  Mutator(std::uint64_t seed, std::size_t max_len) : random_(seed), max_len_(max_len) {}

  std::vector<Entry> corpus;

  /// A copy of one of the corpus, changed.
  Bytes next();

  std::uint64_t below(std::uint64_t bound) { return random_() % bound; }

 private:
  /// A place in `size` bytes, often one near the start, where headers are.
  std::size_t place(std::size_t size) {
    return below(below(4) == 0 ? std::min<std::size_t>(size, 16) : size);
  }

  struct Piece {
    std::size_t at, count;
  };
  /// One of 1, 2, 4, ... 256 bytes, as far as there are so many.
  Piece piece(std::size_t size) {
    const std::size_t at = place(size);
    return {at, std::min<std::size_t>(size - at, std::size_t{1} << below(9))};
  }

  Bytes copied(const Bytes& from, Piece what);
  void insert(Bytes& into, const Bytes& more);
  void overwrite(Bytes& into, const Bytes& with);

  /// Bytes at a place, read as an integer of 1, 2, 4 or 8, and written back.
  template <class Change>
  void integer(Bytes& bytes, Change change);

  void mutate(Bytes& bytes);

  const Bytes& any() { return corpus[below(corpus.size())].bytes; }

  std::mt19937_64 random_;
  std::size_t max_len_;
};

}  // namespace fuzz
