// Loops over threads: every item once, by whoever comes to it, whatever the number of threads and items.
#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "check.hpp"

using namespace blindtail;

namespace {

/// Plain words, so that a sanitizer sees whether loops follow each other.
void test_every_item_once(std::size_t threads) {
  Pool pool(threads);
  CHECK(pool.threads() == threads);
  std::vector<unsigned> times(200), by(200);
  for (std::size_t round = 0; round < 2000; ++round) {
    const std::size_t count = round % times.size();
    pool.each(count, [&](std::size_t item, std::size_t thread) {
      ++times[item];
      by[item] = static_cast<unsigned>(thread);
    });
    for (std::size_t i = 0; i < times.size(); ++i) CHECK(times[i] == (i < count ? 1 : 0));
    for (std::size_t i = 0; i < count; ++i) CHECK(by[i] < threads);
    std::fill(times.begin(), times.end(), 0u);
  }
}

/// What one loop wrote, the next reads in other items.
void test_loops_follow_each_other(std::size_t threads) {
  Pool pool(threads);
  constexpr std::size_t kCount = 64;
  std::vector<unsigned> here(kCount), there(kCount);
  for (unsigned round = 1; round <= 3000; ++round) {
    pool.each(kCount, [&](std::size_t i, std::size_t) { there[i] = here[kCount - 1 - i] + 1; });
    std::swap(here, there);
    CHECK(here[round % kCount] == round);
  }
}

/// Helpers that fell asleep are woken, and a pool ends while they sleep.
void test_after_a_rest() {
  for (int i = 0; i < 3; ++i) {
    Pool pool(4);
    std::vector<int> times(50);
    pool.each(times.size(), [&](std::size_t item, std::size_t) { ++times[item]; });
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    if (i > 0) pool.wake();
    pool.each(times.size(), [&](std::size_t item, std::size_t) { ++times[item]; });
    CHECK(std::count(times.begin(), times.end(), 2) == 50);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

/// Each thread begins with a run of neighbours of its own; what one is kept from doing, others do.
void test_items_of_ones_own() {
  Pool pool(2);
  std::vector<std::size_t> by(10);
  std::atomic<std::size_t> done{0};
  // The caller's first item lasts until all others are done: somebody else did its other four.
  pool.each(by.size(), [&](std::size_t item, std::size_t thread) {
    by[item] = thread;
    if (item == 0 && thread == 0)
      while (done.load() < by.size() - 1) std::this_thread::yield();
    done.fetch_add(1);
  });
  if (by[0] == 0) {
    for (std::size_t i = 1; i < by.size(); ++i) CHECK(by[i] == 1);
  }
  // Both stay with what is theirs where both come to it: item 5 begins the helper's run. (A helper that comes
  // too late finds it done: it may have to be tried again.)
  bool both = false;
  for (int attempt = 0; attempt < 1000 && !both; ++attempt) {
    std::atomic<int> begun{0};
    pool.each(by.size(), [&](std::size_t item, std::size_t thread) {
      by[item] = thread;
      if (item % 5 != 0) return;
      begun.fetch_add(1);
      for (int look = 0; look < 100000 && begun.load() < 2; ++look) std::this_thread::yield();
    });
    both = by[0] == 0 && by[5] == 1;
  }
  CHECK(both);
}

}  // namespace

int main() {
  for (const std::size_t threads : {1, 2, 3, 4, 7}) {
    test_every_item_once(threads);
    test_loops_follow_each_other(threads);
  }
  test_after_a_rest();
  test_items_of_ones_own();
  if (failures == 0) std::puts("pool: all good");
  return failures == 0 ? 0 : 1;
}
