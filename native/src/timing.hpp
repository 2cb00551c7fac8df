// How long the engine's parts take, for benchmarks and for predictions: on uniform residues with keys of
// their own.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine.hpp"

namespace blindtail {

/// Anonymous memory in ordinary pages, for good.
template <class W>
class Pages {
 public:
  Pages() = default;
  explicit Pages(std::size_t count);
  Pages(Pages&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Pages& operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Pages();

  W* data() const { return data_; }
  std::size_t size() const { return count_; }

 private:
  W* data_ = nullptr;
  std::size_t count_ = 0;
};

/// Times parts of an engine at its top level, with the engine's own code.
template <class W>
class EngineTimer {
 public:
  /// primes: data primes, an even number of them, then the special one. rotations: how many keys
  /// there are to rotate with; at least 1. threads: that share the work, as in an evaluation.
  /// Throws std::invalid_argument for what cannot be.
  EngineTimer(int log_n, std::span<const u64> primes, const char* instructions, std::size_t rotations,
              std::size_t threads = 1);

  /// Seconds of each of `times` runs of one part, in ciphertext operations at the top level:
  ///   "ntt", "inverse"  one limb
  ///   "automorphism"    of one limb
  ///   "rotation"        a ciphertext, from NTT form to NTT form, decomposed and divided by P for itself
  ///   "hoisted"         one rotation more of a ciphertext already decomposed, left modulo Q P; the mean
  ///                     of all `rotations`, each with its own key
  ///   "shared"          the mean of `rotations` rotations, what they share included: one decomposition,
  ///                     and one division of both halves by P
  ///   "square"          square, relinearisation and rescaling
  /// Throws std::invalid_argument for any other name.
  std::vector<double> run(const std::string& part, std::size_t times);

  /// Seconds of the steps of an evaluation, one after the other, as one finds the caches that the others
  /// left.
  struct Stages {
    double open;       // a request's body read into residues, and a reply packed
    double expand;     // its seed
    double decompose;  // c1 to coefficients and its digits: (level + 1) (level + 2) transforms
    double rotations;  // of the decomposed ciphertext, added up; each with the next key
    double low;        // rotations likewise at level 0, of a ciphertext decomposed there
    double copies;     // level + 1 limbs scaled, and as many added
    double products;   // with the next diagonals
    double divide;     // both halves by P and the last prime: 2 level + 4 transforms
  };

  /// `times` such evaluations. Keys and plaintexts are taken in turns from so many bytes (up to a key more),
  /// in ordinary pages, as those of mapped files are. rotations: at most as many as in the constructor.
  std::vector<Stages> stages(std::size_t bytes, std::size_t rotations, std::size_t diagonals,
                             std::size_t times);

 private:
  std::size_t n() const { return engine_.chain_.n; }
  void rotation(u32 element);
  void decompose();
  void hoisted();
  void products(const W* plain, std::size_t diagonals);
  void divide();
  void reserve(std::size_t words);
  void open();
  void expand();
  void copies();

  std::size_t level_;
  std::vector<u64> primes_;
  Engine<W> engine_;
  std::vector<u32> elements_;
  Buffer<W> zeros_;  // every map's plaintexts
  std::vector<Buffer<W>> key_words_;
  Keys<W> keys_;
  Buffer<W> out_, turned_;
  Pages<W> held_;  // copies of a key, one after the other
  std::vector<std::uint8_t> body_;
};

extern template class EngineTimer<u32>;
extern template class EngineTimer<u64>;

}  // namespace blindtail
