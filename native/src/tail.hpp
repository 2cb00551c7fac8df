// A program's evaluator from container body to container body: parsing, the engine, the reply.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "encoder.hpp"
#include "engine.hpp"

namespace blindtail {

/// What a key of a key container is: Galois element (0: relinearisation) and its level.
struct KeyShape {
  u32 element = 0;
  std::size_t level = 0;
};

/// Prepared keys in memory that somebody else owns: one block of `Tail::key_bytes` for each shape.
struct StoredKey {
  KeyShape shape;
  std::span<const std::uint8_t> bytes;
};

/// An affine map as the compiler describes it; slots are doubles, one row of N/2 for each diagonal, of which
/// there are as many as `giants` name.
struct MapDescription {
  std::size_t level = 0;
  std::vector<u32> babies;
  std::vector<std::vector<std::pair<std::size_t, std::size_t>>> giants;  // (baby, diagonal) by giant step
  u32 giant = 1;
  std::vector<std::vector<u32>> folds;
  std::span<const double> diagonals;
  double plain_scale = 1;
  std::span<const double> bias;
  double bias_scale = 1;
  std::span<const double> imaginary = {};  // of the diagonals; empty: they are real
  std::vector<std::size_t> inputs = {};    // which operand each baby step turns; empty: the first
  std::vector<std::size_t> sources = {};   // the operands, as values (engine.hpp); empty: the one before
};

/// The two word types behind one face. Throws std::invalid_argument for what cannot be, BodyError for
/// bytes that are not what the program expects.
class Tail {
 public:
  class LoadedKeys {
   public:
    virtual ~LoadedKeys() = default;
    /// No two in a process have the same: a ticket knows the keys it was made with.
    const u64 id = next_id();

   private:
    static u64 next_id();
  };

  /// What of one request was computed ahead, from its seed.
  class Ticket {
   public:
    virtual ~Ticket() = default;
    virtual std::size_t bytes() const = 0;
  };

  virtual ~Tail() = default;
  /// The steps in their order, then `finish`.
  virtual void add_map(const MapDescription& map) = 0;
  /// Bytes of an encoded map, diagonals and bias: a multiple of 64.
  virtual std::size_t map_bytes(std::size_t level, std::size_t diagonals) const = 0;
  /// Encodes a map's diagonals and bias to `out`, `map_bytes` and 64-byte aligned, and adds nothing. The
  /// bytes depend on the word size, not on instructions.
  virtual void encode_map(const MapDescription& map, std::span<std::uint8_t> out) = 0;
  /// As `add_map` for what `encode_map` made of this map: it is read in place, from memory that the caller
  /// keeps alive and unchanged, and the description's diagonals and bias are not looked at.
  virtual void add_encoded_map(const MapDescription& map, std::span<const std::uint8_t> encoded) = 0;
  virtual void add_square(std::size_t level, std::vector<std::size_t> sources = {}) = 0;
  virtual void add_product(std::size_t level, std::vector<std::size_t> sources) = 0;
  /// constant: N / 2 slots, encoded at `scale` and the sum's level, or empty.
  virtual void add_sum(std::size_t level, std::vector<std::size_t> sources, std::span<const double> constant,
                       double scale) = 0;
  /// period, dropped: the form of the reply, which has the results of the last `outputs` steps.
  /// group_bytes: see Engine::finish; results do not depend on it.
  virtual void finish(std::size_t period, int dropped, std::size_t outputs = 1,
                      std::size_t group_bytes = kGroupBytes) = 0;

  virtual int word_bits() const = 0;
  virtual const char* instructions() const = 0;
  /// Of all maps' encoded diagonals and biases, wherever they are.
  virtual std::size_t plain_bytes() const = 0;
  virtual std::size_t inputs() const = 0;
  virtual std::size_t outputs() const = 0;
  /// How many maps each group has that shares its rotations, in order.
  virtual std::vector<std::size_t> groups() const = 0;

  /// Bytes of one prepared key, a multiple of 64.
  virtual std::size_t key_bytes(std::size_t level) const = 0;
  /// From a key's part of a key container to its prepared form; the sizes must be exact.
  virtual void prepare_key(KeyShape shape, std::span<const std::uint8_t> body,
                           std::span<std::uint8_t> out) const = 0;
  virtual std::unique_ptr<LoadedKeys> load_keys(const std::vector<StoredKey>& stored) const = 0;

  /// An evaluation is soon to come: helpers wake up meanwhile. Changes no result; any thread may call it.
  virtual void expect() = 0;
  /// Body of a ciphertext container, all inputs' one after the other, -> body of a reply container, all
  /// outputs' likewise. Thread-safe: one at a time.
  virtual std::vector<std::uint8_t> evaluate(const LoadedKeys& keys, std::span<const std::uint8_t> body,
                                             std::size_t threads) = 0;
  /// With a ticket: the same reply, sooner. The body's seeds must be the ticket's, and the keys the same.
  /// seed: 64 bytes for each input.
  virtual std::unique_ptr<Ticket> make_ticket(const LoadedKeys& keys, std::span<const std::uint8_t> seed,
                                              std::size_t threads) = 0;
  virtual std::vector<std::uint8_t> evaluate(const LoadedKeys& keys, std::span<const std::uint8_t> body,
                                             std::size_t threads, const Ticket& ticket) = 0;
  /// The same between residues, for tests: c0, c1 in NTT form, (level + 1) * N words an input each -> 2 N
  /// words an output.
  virtual std::vector<u64> evaluate_residues(const LoadedKeys& keys, std::span<const u64> c0,
                                             std::span<const u64> c1, std::size_t threads) = 0;
};

/// 32-bit words where all primes allow it, else 64. Primes: data primes, then the special one. inputs: how
/// many ciphertexts a program reads.
std::unique_ptr<Tail> make_tail(int log_n, std::span<const u64> primes, const char* instructions,
                                int word_bits, std::size_t inputs = 1);

}  // namespace blindtail
