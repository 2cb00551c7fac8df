// A tail gives the same bytes for every number of threads, word size and instruction set, with a ticket and
// without: the ring is just large enough that rows are shared in blocks.
#include "tail.hpp"

#include <cstdio>
#include <random>
#include <string>
#include <thread>

#include "body.hpp"
#include "check.hpp"
#include "tail_check.hpp"

using namespace blindtail;

namespace {

/// A tail with keys: a map with baby and giant steps and folds, a square, a map with two groups of folds. If
/// `joined`, no chain: a product with the input and a sum besides, and the last map reads the input as well.
struct Subject {
  std::unique_ptr<Tail> tail;
  TestKeys held;
  std::unique_ptr<Tail::LoadedKeys> keys;

  Subject(const char* instructions, int word_bits, bool joined = false)
      : tail(make_tail(kLogN, kPrimes, instructions, word_bits)) {
    std::mt19937_64 random(1);
    std::vector<double> slots(4 * kN / 2), bias(kN / 2);
    for (double& x : slots) x = static_cast<double>(random() % 2001) / 1000 - 1;
    for (double& x : bias) x = static_cast<double>(random() % 2001) / 1000 - 1;
    const std::span<const double> half(slots.data(), slots.size() / 2);
    tail->add_map({3, {1, 3}, {{{0, 0}, {1, 1}}, {{0, 2}, {1, 3}}}, 9, {{5}}, slots, 1e8, bias, 5e7});
    tail->add_square(2);
    const std::vector<std::vector<u32>> folds{{2 * kN - 1}, {2 * kN - 1}};
    if (joined) {
      tail->add_product(2, {1, 0});
      tail->add_sum(1, {2, 3}, bias, 5e7);
      const std::span<const double> three(slots.data(), 3 * kN / 2);
      tail->add_map({1,
                     {1, 25, 1},
                     {{{0, 0}, {1, 1}, {2, 2}}},
                     1,
                     folds,
                     three,
                     1e8,
                     bias,
                     5e7,
                     {},
                     {0, 0, 1},
                     {4, 0}});
    } else {
      tail->add_map({1, {1, 25}, {{{0, 0}, {1, 1}}}, 1, folds, half, 1e8, bias, 5e7});
    }
    tail->finish(8, 3);
    keys = held.load(*tail, random);
  }
};

void test_all_alike(bool joined) {
  const std::vector<std::uint8_t> body = request(2), other = request(3);
  const Bytes seed = Bytes(body).first(kSeedBytes);
  std::vector<std::uint8_t> wanted;
  for (const int word_bits : {32, 64})
    for (const char* name : {"portable", "avx2", "avx512"}) {
      if (word_bits == 64 && name != std::string("portable")) continue;
      try {
        Subject one(name, word_bits, joined);
        for (const std::size_t threads : {1, 2, 3, 4, 8}) {
          const auto reply = one.tail->evaluate(*one.keys, body, threads);
          if (wanted.empty()) wanted = reply;
          CHECK(reply == wanted);
          CHECK(one.tail->evaluate(*one.keys, other, threads) != wanted);
          one.tail->expect();
          const auto ticket = one.tail->make_ticket(*one.keys, seed, threads);
          CHECK(one.tail->evaluate(*one.keys, body, threads, *ticket) == wanted);
        }
      } catch (const std::invalid_argument&) {
        CHECK(name != std::string("portable"));
        std::printf("no %s here\n", name);
      }
    }
}

/// Runs take turns, and to expect one disturbs none.
void test_several_callers() {
  Subject one(nullptr, 32);
  const std::vector<std::uint8_t> body = request(2);
  const auto wanted = one.tail->evaluate(*one.keys, body, 2);
  std::vector<std::thread> callers;
  std::vector<int> same(3);
  for (std::size_t i = 0; i < same.size(); ++i)
    callers.emplace_back([&, i] {
      for (int k = 0; k < 10; ++k) {
        one.tail->expect();
        same[i] += one.tail->evaluate(*one.keys, body, 2) == wanted;
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (const int count : same) CHECK(count == 10);
}

/// A residue that is not below its prime is refused in whichever row it is, by any number of threads.
void test_bad_residues() {
  Subject one(nullptr, 32);
  const std::vector<std::uint8_t> body = request(2);
  const auto wanted = one.tail->evaluate(*one.keys, body, 1);
  const std::size_t row = packed_bytes(kN, 30);
  for (std::size_t j = 0; j + 1 < kPrimes.size(); ++j)
    for (const std::size_t threads : {1, 2, 3}) {
      auto bad = body;
      for (std::size_t i = 0; i < 8; ++i) bad[kSeedBytes + (j + 1) * row - 8 + i] = 0xff;
      bool refused = false;
      try {
        one.tail->evaluate(*one.keys, bad, threads);
      } catch (const BodyError&) {
        refused = true;
      }
      CHECK(refused);
      CHECK(one.tail->evaluate(*one.keys, body, threads) == wanted);
    }
}

/// A plan that reads what is not there, or above its level, or that ends early, is refused.
void test_plans_that_cannot_be() {
  const std::vector<double> slots(2 * kN / 2), bias(kN / 2);
  const auto refused = [&](const auto& plan) {
    auto tail = make_tail(kLogN, kPrimes, "portable", 32);
    tail->add_map({3, {1, 3}, {{{0, 0}, {1, 1}}}, 1, {}, slots, 1e8, bias, 5e7});
    try {
      plan(*tail);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  const MapDescription last{1, {1, 25}, {{{0, 0}, {1, 1}}}, 1, {}, slots, 1e8, bias, 5e7};
  CHECK(!refused([&](Tail& t) { t.add_square(2, {1}), t.add_map(last), t.finish(8, 3); }));  // the control
  CHECK(refused([&](Tail& t) { t.add_square(2, {2}); }));
  CHECK(refused([&](Tail& t) { t.add_square(3, {1}); }));
  CHECK(refused([&](Tail& t) { t.add_square(0, {1}); }));
  CHECK(refused([&](Tail& t) { t.add_square(2, {1, 1}); }));
  CHECK(refused([&](Tail& t) { t.add_product(2, {1}); }));
  CHECK(refused([&](Tail& t) { t.add_sum(2, {}, bias, 1e8); }));
  CHECK(refused([&](Tail& t) { t.add_sum(2, {1}, std::span(bias).first(8), 1e8); }));
  CHECK(refused([&](Tail& t) { t.add_product(1, {1, 0}), t.finish(8, 3); }));
  CHECK(refused([&](Tail& t) {
    auto map = last;
    map.inputs = {0, 1};
    t.add_map(map);
  }));
}

}  // namespace

int main() {
  test_all_alike(false);
  test_all_alike(true);
  test_plans_that_cannot_be();
  test_several_callers();
  test_bad_residues();
  if (failures == 0) std::puts("tail: all good");
  return failures == 0 ? 0 : 1;
}
