// Tails over several ciphertexts: what they compute is what tails over one compute, and maps that share
// their rotations give the bytes of maps run one by one.
#include <cstdio>
#include <functional>
#include <string>

#include "check.hpp"
#include "tail_check.hpp"

using namespace blindtail;

namespace {

using Body = std::vector<std::uint8_t>;

/// Random slots for up to four diagonals, and a bias.
struct Weights {
  std::vector<double> slots = std::vector<double>(4 * kN / 2), bias = std::vector<double>(kN / 2);

  explicit Weights(unsigned seed) {
    std::mt19937_64 random(seed);
    for (double& x : slots) x = static_cast<double>(random() % 2001) / 1000 - 1;
    for (double& x : bias) x = static_cast<double>(random() % 2001) / 1000 - 1;
  }
  MapDescription map(std::size_t level, std::vector<u32> babies,
                     std::vector<std::vector<std::pair<std::size_t, std::size_t>>> giants,
                     std::vector<std::vector<u32>> folds, std::vector<std::size_t> inputs,
                     Sources sources) const {
    MapDescription made;
    made.level = level;
    made.babies = std::move(babies);
    made.giant = giants.size() > 1 ? 9 : 1;
    std::size_t diagonals = 0;
    for (const auto& giant : giants) diagonals += giant.size();
    made.giants = std::move(giants);
    made.folds = std::move(folds);
    made.diagonals = std::span(slots).first(diagonals * kN / 2);
    made.plain_scale = 1e8;
    made.bias = bias;
    made.bias_scale = 5e7;
    made.inputs = std::move(inputs);
    made.sources = std::move(sources);
    return made;
  }
};

const Weights kWeights[] = {Weights(1), Weights(2), Weights(3), Weights(4), Weights(5)};
const std::vector<u32> kLastFold{2 * kN - 1};

/// Of two inputs: three maps of both, with different rotations, a product, a sum; then the outputs that are
/// asked for, each a map of the sum and of the first input. inputs = 1: of one ciphertext in both places.
void build(Tail& tail, std::size_t inputs, const std::vector<int>& outputs) {
  const std::size_t b = inputs - 1;  // the second input
  const auto value = [&](std::size_t step) { return inputs + step; };
  const std::vector<u32> giant{5};
  tail.add_map(
      kWeights[0].map(3, {1, 3, 3, 1}, {{{0, 0}, {1, 1}, {2, 2}}, {{3, 3}}}, {giant}, {0, 0, 1, 1}, {0, b}));
  tail.add_map(kWeights[1].map(3, {3}, {{{0, 0}}}, {}, {0}, {0, b}));
  tail.add_map(kWeights[2].map(3, {9, 3}, {{{1, 0}}, {}, {{0, 1}, {1, 2}}}, {}, {1, 1}, {0, b}));
  tail.add_product(2, {value(0), value(1)});
  tail.add_sum(1, {value(3), value(2)}, kWeights[3].bias, 5e7);
  for (const int output : outputs) {
    const Weights& one = kWeights[3 + output];
    const Sources read{value(4), 0};
    if (output == 0)
      tail.add_map(
          one.map(1, {1, 25, 1}, {{{0, 0}, {1, 1}, {2, 2}}}, {kLastFold, kLastFold}, {0, 0, 1}, read));
    else
      tail.add_map(one.map(1, {25, 25}, {{{1, 0}, {0, 1}}}, {kLastFold}, {0, 1}, read));
  }
}

/// A tail with the keys that every other has as well.
struct Subject {
  std::unique_ptr<Tail> tail;
  TestKeys held;
  std::unique_ptr<Tail::LoadedKeys> keys;

  Subject(std::size_t inputs, const std::vector<int>& outputs, std::size_t group_bytes = kGroupBytes,
          const char* instructions = nullptr, int word_bits = 32)
      : Subject(inputs, instructions, word_bits, [&](Tail& made) {
          build(made, inputs, outputs);
          made.finish(8, 3, outputs.size(), group_bytes);
        }) {}
  Subject(std::size_t inputs, const char* instructions, int word_bits, const std::function<void(Tail&)>& plan)
      : tail(make_tail(kLogN, kPrimes, instructions, word_bits, inputs)) {
    plan(*tail);
    std::mt19937_64 random(7);
    keys = held.load(*tail, random);
  }
  Body run(const Body& body, std::size_t threads = 1) { return tail->evaluate(*keys, body, threads); }
  Body run(const Body& body, const Tail::Ticket& ticket, std::size_t threads = 1) {
    return tail->evaluate(*keys, body, threads, ticket);
  }
  std::unique_ptr<Tail::Ticket> ticket(const Body& seeds, std::size_t threads = 1) {
    return tail->make_ticket(*keys, seeds, threads);
  }
};

Body joined(const Body& a, const Body& b) {
  Body both = a;
  both.insert(both.end(), b.begin(), b.end());
  return both;
}

/// The seeds of a body of two ciphertexts.
Body seeds(const Body& body) {
  const auto half = body.begin() + static_cast<std::ptrdiff_t>(body.size() / 2);
  return joined({body.begin(), body.begin() + kSeedBytes}, {half, half + kSeedBytes});
}

const Body kFirst = request(2), kSecond = request(3), kBoth = joined(kFirst, kSecond);

/// Every word size, instruction set and number of threads, in groups of any size, with and without a ticket.
void test_all_alike() {
  Body wanted;
  for (const int word_bits : {32, 64})
    for (const char* name : {"portable", "avx2", "avx512"}) {
      if (word_bits == 64 && name != std::string("portable")) continue;
      const std::size_t pair = 2 * 6 * kN * static_cast<std::size_t>(word_bits) / 8;  // one giant step's sums
      const std::vector<std::pair<std::size_t, std::vector<std::size_t>>> bounds{
          {kGroupBytes, {3, 2}}, {0, {1, 1, 1, 1, 1}}, {4 * pair - 1, {2, 1, 2}}};
      try {
        for (const auto& [bytes, groups] : bounds) {
          Subject one(2, {0, 1}, bytes, name, word_bits);
          CHECK(one.tail->groups() == groups);
          for (const std::size_t threads : {1, 2, 3, 8}) {
            const Body reply = one.run(kBoth, threads);
            if (wanted.empty()) wanted = reply;
            CHECK(reply == wanted);
            CHECK(one.run(kBoth, *one.ticket(seeds(kBoth), threads), threads) == wanted);
          }
        }
      } catch (const std::invalid_argument&) {
        CHECK(name != std::string("portable"));
        std::printf("no %s here\n", name);
      }
    }
}

/// The same ciphertext twice is one that is read twice, and each output is that of a tail that has no other.
void test_one_and_several() {
  Subject wide(2, {0, 1}), narrow(1, {0}), other(1, {1}), first(2, {0}), second(2, {1}), turned(2, {1, 0});
  const Body twice = joined(kFirst, kFirst), x = narrow.run(kFirst), y = other.run(kFirst);
  CHECK(x != y);
  CHECK(wide.run(twice, 2) == joined(x, y));
  CHECK(wide.run(kBoth) != joined(x, y));
  CHECK(wide.run(kBoth) == joined(first.run(kBoth), second.run(kBoth)));
  CHECK(turned.run(kBoth) == joined(second.run(kBoth), first.run(kBoth)));
  CHECK(wide.run(joined(kSecond, kFirst)) != wide.run(kBoth));  // which is which matters
}

/// Several outputs of one input, and a chain that reads the second input alone.
void test_one_of_two() {
  const auto chain = [](Tail& tail, std::size_t read) {
    const std::size_t square = tail.inputs() + 1;
    tail.add_map(kWeights[0].map(3, {1, 3}, {{{0, 0}}, {{1, 1}}}, {{5}}, {}, {read}));
    tail.add_square(2, {square - 1});
    tail.add_map(kWeights[1].map(1, {1, 25}, {{{0, 0}, {1, 1}}}, {kLastFold}, {}, {square}));
    if (tail.inputs() == 1) return tail.finish(8, 3);
    tail.add_map(kWeights[2].map(1, {25}, {{{0, 0}}}, {}, {}, {square}));
    tail.finish(8, 3, 2);
  };
  Subject alone(1, nullptr, 32, [&](Tail& tail) { chain(tail, 0); });
  Subject pair(2, nullptr, 32, [&](Tail& tail) { chain(tail, 1); });
  const Body wanted = alone.run(kSecond), reply = pair.run(kBoth);
  CHECK(reply.size() == 2 * wanted.size());
  CHECK(Body(reply.begin(), reply.begin() + static_cast<std::ptrdiff_t>(wanted.size())) == wanted);
  CHECK(pair.run(kBoth, *pair.ticket(seeds(kBoth))) == reply);
  CHECK(pair.run(joined(kSecond, kSecond)) == reply);  // nothing reads the first
}

/// Residues of both inputs in, of both outputs out.
void test_residues() {
  Subject wide(2, {0, 1}), first(2, {0}), second(2, {1}), narrow(1, {0});
  const std::size_t words = (kPrimes.size() - 1) * kN;
  std::mt19937_64 random(9);
  std::vector<u64> c0, c1;
  for (std::size_t i = 0; i < 2 * words; ++i) {
    c0.push_back(random() % kPrimes[i / kN % (kPrimes.size() - 1)]);
    c1.push_back(random() % kPrimes[i / kN % (kPrimes.size() - 1)]);
  }
  auto both = first.tail->evaluate_residues(*first.keys, c0, c1, 1);
  const auto rest = second.tail->evaluate_residues(*second.keys, c0, c1, 1);
  CHECK(both.size() == 2 * kN);
  both.insert(both.end(), rest.begin(), rest.end());
  CHECK(wide.tail->evaluate_residues(*wide.keys, c0, c1, 2) == both);
  const std::span<const u64> half(c0.data(), words);
  CHECK(throws<std::invalid_argument>([&] { wide.tail->evaluate_residues(*wide.keys, half, half, 1); }));
  CHECK(throws<std::invalid_argument>([&] { narrow.tail->evaluate_residues(*narrow.keys, c0, c1, 1); }));
}

/// What is not two whole ciphertexts is refused, whatever is wrong and wherever.
void test_bad_bodies() {
  Subject one(2, {0, 1});
  const Body wanted = one.run(kBoth);
  const auto ticket = one.ticket(seeds(kBoth));
  const auto refused = [&](const Body& body) {
    const bool plain = throws<BodyError>([&] { one.run(body, 2); });
    const bool with = throws<BodyError>([&] { one.run(body, *ticket, 2); });
    CHECK(plain == with);
    CHECK(one.run(kBoth) == wanted);  // nothing of it stays behind
    return plain;
  };
  CHECK(!refused(kBoth));  // the control
  CHECK(refused({}));
  CHECK(refused(kFirst));
  CHECK(refused({kBoth.begin(), kBoth.end() - 1}));
  CHECK(refused(joined(kBoth, {0})));
  CHECK(refused(joined(kBoth, kFirst)));
  const std::size_t row = packed_bytes(kN, 30);
  for (std::size_t part = 0; part < 2; ++part)
    for (std::size_t j = 0; j + 1 < kPrimes.size(); ++j) {
      Body bad = kBoth;
      for (std::size_t i = 0; i < 8; ++i)
        bad[part * kFirst.size() + kSeedBytes + (j + 1) * row - 8 + i] = 0xff;
      CHECK(refused(bad));
    }
}

void test_tickets_of_others() {
  Subject one(2, {0, 1}), narrow(1, {0});
  const Body own = seeds(kBoth);
  for (const std::size_t size : {0, 64, 127, 129, 192})
    CHECK(throws<std::invalid_argument>([&] { one.ticket(Body(size)); }));
  CHECK(throws<std::invalid_argument>([&] { narrow.ticket(own); }));
  const auto swapped = one.ticket(seeds(joined(kSecond, kFirst)));
  CHECK(throws<std::invalid_argument>([&] { one.run(kBoth, *swapped); }));
  CHECK(one.run(kBoth, *one.ticket(own)) == one.run(kBoth));
}

/// Maps are a group where they follow one another and read the same in the same order at the same level.
void test_groups() {
  const auto groups = [](const std::vector<std::pair<std::size_t, Sources>>& maps) {
    auto tail = make_tail(kLogN, kPrimes, nullptr, 32, 2);
    for (const auto& [level, sources] : maps)
      tail->add_map(kWeights[0].map(level, {1}, {{{0, 0}}}, {}, {}, sources));
    tail->add_map(kWeights[0].map(1, {1}, {{{0, 0}}}, {}, {}, {2}));
    tail->finish(8, 3);
    return tail->groups();
  };
  using Sizes = std::vector<std::size_t>;
  CHECK((groups({{3, {0, 1}}, {3, {0, 1}}, {3, {0, 1}}}) == Sizes{3, 1}));
  CHECK((groups({{3, {0, 1}}, {3, {1, 0}}}) == Sizes{1, 1, 1}));
  CHECK((groups({{3, {0, 1}}, {2, {0, 1}}}) == Sizes{1, 1, 1}));
  CHECK((groups({{3, {0}}, {3, {0, 1}}, {3, {0, 1}}, {3, {1}}}) == Sizes{1, 2, 1, 1}));
  CHECK((groups({{3, {0}}, {2, {2}}, {2, {2}}}) == Sizes{1, 2, 1}));
}

void test_plans_that_cannot_be() {
  for (const std::size_t inputs : {std::size_t{0}, std::size_t{65}, ~std::size_t{0}})
    CHECK(throws<std::invalid_argument>([&] { make_tail(kLogN, kPrimes, nullptr, 32, inputs); }));
  const auto ends = [](const std::vector<std::size_t>& levels, std::size_t outputs, bool square = false) {
    auto tail = make_tail(kLogN, kPrimes, "portable", 32, 2);
    for (const std::size_t level : levels)
      tail->add_map(kWeights[0].map(level, {1}, {{{0, 0}}}, {}, {}, {0, 1}));
    if (square) tail->add_square(1, {0});
    tail->finish(8, 3, outputs);
  };
  const auto refused = [&](auto... plan) { return throws<std::invalid_argument>([&] { ends(plan...); }); };
  using Levels = std::vector<std::size_t>;
  CHECK(!refused(Levels{1}, std::size_t{1}));  // the controls
  CHECK(!refused(Levels{3, 1, 1}, std::size_t{2}));
  CHECK(!refused(Levels(64, 1), std::size_t{64}));
  CHECK(refused(Levels{3, 1, 1}, std::size_t{3}));  // too few, too many
  CHECK(refused(Levels{3, 1, 1}, std::size_t{1}));
  CHECK(refused(Levels{1, 1}, std::size_t{3}));
  CHECK(refused(Levels{1, 1}, std::size_t{0}));
  CHECK(refused(Levels(65, 1), std::size_t{65}));
  CHECK(refused(Levels{3, 1}, std::size_t{2}, true));
  CHECK(throws<std::invalid_argument>([] {
    auto tail = make_tail(kLogN, kPrimes, "portable", 32, 2);
    tail->add_map(kWeights[0].map(3, {1}, {{{0, 0}}}, {}, {}, {2}));  // makes value 2
  }));
}

}  // namespace

int main() {
  test_all_alike();
  test_one_and_several();
  test_one_of_two();
  test_residues();
  test_bad_bodies();
  test_tickets_of_others();
  test_groups();
  test_plans_that_cannot_be();
  if (failures == 0) std::puts("wide: all good");
  return failures == 0 ? 0 : 1;
}
