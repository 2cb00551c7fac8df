// One encrypted tail on CKKS ciphertexts in residue form: the plan and its run.
//
// Levels as in blindtail.he.params: a level-l ciphertext has limbs q_0 ... q_l; the
// special prime P is the last of `primes`. Key switching is SEAL's (one digit a prime,
// one special prime), arranged for speed: digits are made once and shared by all
// rotations of a ciphertext (hoisting: Halevi and Shoup, CRYPTO 2018), sums stay modulo
// Q P until the end of a map (double hoisting: Bossuat et al., EUROCRYPT 2021), giant
// steps run Horner-style with one key, and dividing by P and by the map's prime is one step.
//
// Most plans are chains, each step reading what the one before gave, in whatever form it gave it. Plans
// that join values of several steps, or have several inputs or outputs, keep every value in NTT form until
// its last use (engine_graph.cpp).
#pragma once

#include <cstddef>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "ring.hpp"

namespace blindtail {

/// Primes of a parameter set, the special one last, and constants between them.
template <class W>
struct Chain {
  int log_n;
  std::size_t n;
  std::vector<Prime<W>> primes;
  const Kernels<W>& k;
  // By [divisor][prime], Montgomery form: divisor mod prime, divisor^-1 mod prime.
  std::vector<std::vector<W>> value, inverse;

  Chain(int log_n, std::span<const u64> primes, const char* instructions);
  Chain(const Chain&) = delete;
  std::size_t special() const { return primes.size() - 1; }
  const Modulus<W>& mod(std::size_t j) const { return primes[j].mod; }
  /// A digit of prime `from` as words below 4q of prime `to`, centred.
  void lift(std::size_t to, W* out, const W* in, std::size_t from) const;
};

/// An evaluation key in memory: for each prime 0 ... level and the special one, for each digit
/// 0 ... level, two limbs (the halves of the key), Montgomery form, turned back by the key's
/// automorphism, so that the sum of products is turned once.
template <class W>
struct Key {
  std::size_t level = 0;
  const W* words = nullptr;

  std::size_t limbs() const { return 2 * (level + 2) * (level + 1); }
  /// Half `half` of digit `digit`, row j (level + 1 = the special prime's).
  const W* at(std::size_t row, std::size_t digit, std::size_t half, std::size_t n) const {
    return words + ((row * (level + 1) + digit) * 2 + half) * n;
  }
};

/// Evaluation keys by Galois element; element 0 is the relinearisation key.
template <class W>
using Keys = std::map<u32, Key<W>>;

/// One affine map; see blindtail.he.operations.MapOp.
template <class W>
struct MapStep {
  struct Term {
    std::size_t baby;      // index into `babies`
    std::size_t diagonal;  // index of the plaintext
  };
  std::size_t level = 0;
  std::vector<u32> babies;          // Galois elements; 1 = the input itself
  std::vector<std::size_t> inputs;  // which of the step's operands each baby step turns; empty: the first
  std::vector<std::vector<Term>> giants;  // by giant step
  u32 giant = 1;                          // Galois element of one giant step
  std::vector<std::vector<u32>> folds;    // groups of Galois elements
  std::size_t diagonals = 0;
  // In memory that whoever adds the step keeps alive, 64-byte aligned.
  std::span<const W> plain;  // [prime 0 ... level, special][diagonal][n], Montgomery form
  std::span<const W> bias;   // [prime 0 ... level - 1][n], NTT form (coefficient form in an output's map)
};

/// What a step reads: values by number. Inputs are 0 ... I - 1, step i makes I + i. Empty: the one before.
using Sources = std::vector<std::size_t>;

/// Ciphertexts that a plan reads, and that it makes, at most.
inline constexpr std::size_t kMostInputs = 64, kMostOutputs = 64;
/// Bytes of sums that maps run as one group may take; a map that needs more is run alone.
inline constexpr std::size_t kGroupBytes = std::size_t{256} << 20;

template <class W>
class EngineTimer;

template <class W>
class Engine {
 public:
  Engine(int log_n, std::span<const u64> primes, const char* instructions, std::size_t inputs = 1);

  /// Steps in order of execution; operands above a step's level are taken at that level. The first step's
  /// level is that of every input.
  void add_map(MapStep<W> step, Sources sources = {});
  void add_square(std::size_t level, Sources sources = {});
  /// Of two values, relinearised and rescaled.
  void add_product(std::size_t level, Sources sources);
  /// Of one or two values and, unless it is empty, `constant`: [prime 0 ... level][n], NTT form. Stays at
  /// its level.
  void add_sum(std::size_t level, Sources sources, Buffer<W> constant);
  /// The results of the last `outputs` steps are the plan's; they are maps at level 1. Allocates what a run
  /// needs. group_bytes: see kGroupBytes; 0 runs every map by itself, with the same result.
  void finish(std::size_t outputs = 1, std::size_t group_bytes = kGroupBytes);

  const Chain<W>& chain() const { return chain_; }
  std::size_t input_level() const { return input_level_; }
  std::size_t inputs() const { return inputs_; }
  std::size_t outputs() const { return outputs_; }
  /// How many maps each group has that shares its rotations, in order.
  std::vector<std::size_t> groups() const;
  /// Where a run reads an input: limbs 0 ... input level of c0 and c1, NTT form. Other words after a run.
  W* input(std::size_t half, std::size_t prime, std::size_t index = 0);
  /// c0 and c1 of a result: level 0, coefficient form.
  const W* output(std::size_t half, std::size_t index = 0) const;
  /// The threads of a run, for what is to be done before it: parsing, say.
  /// Throws std::out_of_range when a key is missing or too low, as all that follow do.
  Pool& pool(const Keys<W>& keys, std::size_t threads);
  /// A run is soon to come: its threads, where there are any yet, need not be woken then.
  void wake() {
    if (pool_) pool_->wake();
  }
  /// Not thread-safe: one run at a time.
  void run(const Keys<W>& keys, std::size_t threads);
  /// Words of what a ticket holds.
  std::size_t ticket_words() const { return ticket_limbs() * n(); }
  /// All that depends on c1 alone, up to the first square's keyswitch, from the inputs' c1.
  void make_ticket(const Keys<W>& keys, std::size_t threads, W* words);
  /// The same result as `run` for the c1 that the ticket was made of, from the inputs' c0.
  void run_ticket(const Keys<W>& keys, std::size_t threads, const W* words);
  /// Automorphism of a Galois element that the plan uses.
  const Automorphism& automorphism(u32 element) const;

 private:
  friend class EngineTimer<W>;                      // benchmarks time the parts below
  enum class Form { kNtt, kTimesP, kCoefficient };  // kTimesP: NTT form, times P; by mod_down_rescale alone
  /// Half of a ciphertext to divide: from rows of `in` to rows of `out`. `plus`, in the same form, is added.
  struct Half {
    const W* in;
    W* out;
    Form form;
    const W* plus = nullptr;
  };
  /// Part of a row: words first ... first + count - 1.
  struct Block {
    std::size_t first, count;
  };
  enum class Kind { kMap, kSquare, kProduct, kSum };
  struct Step {
    Kind kind;
    std::size_t level;
    Sources sources;
    std::unique_ptr<MapStep<W>> map = nullptr;
    Buffer<W> constant = {};
    // Of a map, by `make_groups`: its group, the first of its sums in it, and, by baby step, which of its
    // operand's turns that is.
    std::size_t group = 0, sums = 0;
    std::vector<std::size_t> turns = {};
  };
  /// Maps that follow one another and read the same values at the same level: the digits of what they read,
  /// and each of its rotations, are made once for all of them.
  struct MapGroup {
    std::size_t first = 0, count = 0;     // steps
    std::vector<std::vector<u32>> turns;  // by operand: distinct Galois elements; 1 = the operand itself
  };
  /// A value of a plan that is no chain: where it is kept, in NTT form.
  struct Place {
    std::size_t buffer, level;
  };

  /// Where the parts of a ticket are; limbs by row.
  struct TicketParts {
    W* map;      // T(c1) of the first map, modulo Q P
    W* fold;     // and of its folds, one level below
    W* c1;       // after the map: NTT form before a square, else coefficients
    W* square0;  // keyswitch of c1^2, modulo Q P
    W* square1;
  };
  // Limbs of scratch a thread needs besides rotated inputs.
  static constexpr std::size_t kTemporaries = 4;
  // Blocks are no shorter: each begins new streams of keys.
  static constexpr std::size_t kShortest = 512;
  // Between limbs that are read together, so that they do not all want the same lines of a cache.
  static constexpr std::size_t kGap = 5 * 64 / sizeof(W);

  std::size_t ticket_limbs() const;
  TicketParts ticket_parts(W* words) const;
  void map_row_of_c0(const MapStep<W>& map, std::size_t row, std::size_t thread, W* out);

  void add(Step step);
  void place_values();
  void make_groups(std::size_t most_bytes);
  void run_graph(const Keys<W>& keys);
  void run_group(const MapGroup& group, const Keys<W>& keys);
  void graph_sum(const Step& step);
  void graph_product(const Step& step, const Keys<W>& keys);
  void load(std::size_t value, std::size_t level, bool turned);
  void keep(std::size_t step);
  /// Whether a step's result is one of the plan's.
  bool is_output(std::size_t step) const { return step + outputs_ >= steps_.size(); }
  W* kept(std::size_t value, std::size_t half) {
    const Place& place = places_[value];
    return values_[place.buffer].data() + half * max_rows_ * n();
  }
  void use(u32 element);
  void begin(const Keys<W>& keys, std::size_t threads);
  void run_from(std::size_t first, const Keys<W>& keys);
  void map_sums(const Step& step, const Keys<W>& keys);
  void map_products(const MapGroup& group, const Keys<W>& keys, std::size_t input = 0);
  void turn_block(const MapGroup& group, const Keys<W>& keys, std::size_t input, std::size_t row, Block block,
                  std::size_t thread);
  void add_products(const Step& step, std::size_t input, std::size_t row, Block block, std::size_t thread);
  void giant_steps(const Step& step, const Keys<W>& keys);
  /// From the giant steps' sums to the map's result.
  void finish_map(const Step& step, const Keys<W>& keys, bool last, bool next_square);
  std::size_t fold_all(const MapStep<W>& step, const Keys<W>& keys, std::size_t sums);
  void square_sums(std::size_t level, const Keys<W>& keys);
  void relinearise(std::size_t level, const Keys<W>& keys);
  void check(const Keys<W>& keys) const;
  std::size_t prime_of(std::size_t row, std::size_t level) const {
    return row <= level ? row : chain_.special();
  }

  void run_map(const Step& step, const Keys<W>& keys, bool last, bool next_square);
  void run_square(std::size_t level, const Keys<W>& keys);
  void fold(const MapStep<W>& step, const Keys<W>& keys, std::size_t group, std::size_t sums = 0);

  /// Digits of c1 (coefficient form in `coef_`) over q_0 ... q_level and P; `own` = its NTT form or null.
  void decompose(std::size_t level, const W* own);
  /// body(row, block, thread) for all blocks of `rows` rows.
  template <class Body>
  void each_block(std::size_t rows, const Body& body) {
    const std::size_t count = n() / blocks_;
    pool_->each(rows * blocks_, [&](std::size_t item, std::size_t thread) {
      body(item / blocks_, Block{item % blocks_ * count, count}, thread);
    });
  }
  /// What an automorphism takes a block from.
  static Block source(const Automorphism& turn, Block block) {
    return {turn.source(block.first, block.count), block.count};
  }
  /// sum of digits times key, one block of row `row`, into out0, out1.
  void switch_row(const Key<W>& key, std::size_t level, std::size_t row, Block block, W* out0, W* out1) const;
  /// c0_ times P, rows 0 ... level: as a map reads it.
  void times_p(std::size_t level);
  /// Divide rows 0 ... level and P by P; `out` rows 0 ... level.
  void mod_down(std::size_t level, std::initializer_list<Half> halves);
  /// Divide by P and q_level; `out` rows 0 ... level - 1.
  void mod_down_rescale(std::size_t level, std::initializer_list<Half> halves);
  /// out = (x - t) * factor + plus, one block of row `row`; x and t begin with the block.
  void put(const Half& half, std::size_t row, Block block, const W* x, const W* t, W factor);

  /// Limbs of a thread; those of a block lie as close as `count` allows.
  W* scratch(std::size_t thread, std::size_t limb, std::size_t count) {
    return scratch_.data() + thread * scratch_limbs_ * (n() + kGap) + limb * (count + kGap);
  }
  W* scratch(std::size_t thread, std::size_t limb) { return scratch(thread, limb, n()); }
  W* digit(std::size_t row, std::size_t i) { return digits_.data() + (row * max_rows_ + i) * (n() + kGap); }
  W* sum(std::size_t index, std::size_t half) {
    return sums_.data() + (index * 2 + half) * (max_rows_ + 1) * n();
  }
  /// The half of a rotated operand that products read, one block of it.
  W* turned(std::size_t turn, std::size_t half, Block block, std::size_t thread) {
    return scratch(thread, kTemporaries + 2 * turn + half, block.count);
  }
  std::size_t n() const { return chain_.n; }

  Chain<W> chain_;
  std::vector<Step> steps_;
  std::vector<MapGroup> groups_;
  bool chain_only_ = true;     // one input and output; each step reads the one before, a map or a square
  std::vector<Place> places_;  // by value, in plans that are no chain
  std::vector<Buffer<W>> values_;
  std::map<u32, Automorphism> automorphisms_;
  std::size_t inputs_, outputs_ = 1;
  std::size_t input_level_ = 0, max_rows_ = 0, scratch_limbs_ = 0, max_sums_ = 0;
  std::size_t blocks_ = 1;  // of a row, in loops word by word
  std::unique_ptr<Pool> pool_;
  // c0 in NTT form (times P where a map or a fold reads it), c1 in NTT form (where known) and in
  // coefficient form; limbs by prime.
  Buffer<W> c0_, c1_, coef_, digits_, sums_, scratch_, work_;
  Buffer<W> results_;           // of plans that are no chain: by output, c0 and c1
  std::vector<const W*> rows_;  // [row][digit] pointers of the last decomposition
};

extern template class Engine<u32>;
extern template class Engine<u64>;
extern template struct Chain<u32>;
extern template struct Chain<u64>;

}  // namespace blindtail
