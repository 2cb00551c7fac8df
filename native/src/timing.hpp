// How long the engine's parts take, for benchmarks: on uniform residues with keys of their own, one thread.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "engine.hpp"

namespace blindtail {

/// Times parts of an engine at its top level, with the engine's own code.
template <class W>
class EngineTimer {
 public:
  /// primes: data primes, an even number of them, then the special one. rotations: how many keys
  /// there are to rotate with; at least 1. Throws std::invalid_argument for what cannot be.
  EngineTimer(int log_n, std::span<const u64> primes, const char* instructions, std::size_t rotations);

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

 private:
  std::size_t n() const { return engine_.chain_.n; }
  void rotation(u32 element);
  void decompose();
  void hoisted();
  void divide();

  std::size_t level_;
  Engine<W> engine_;
  std::vector<u32> elements_;
  std::vector<Buffer<W>> key_words_;
  Keys<W> keys_;
  Buffer<W> out_, turned_;
};

extern template class EngineTimer<u32>;
extern template class EngineTimer<u64>;

}  // namespace blindtail
