// Threads for one evaluation: the caller works too, the others wait between phases.
//
// A run has some fifty phases of 5 to 500 microseconds, and waking a sleeping thread takes as
// long as a short one. So helpers look for the next phase for a while before they sleep, and
// the caller never waits for one that came too late to find work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace blindtail {

/// Runs loops over independent items. Not reentrant: one loop at a time. Bodies must not throw.
///
/// Each thread has a run of neighbouring items of its own, the same in every loop of as many items, so that
/// what one loop leaves in a core's cache is there for the next. Who is done takes from the others' runs.
class Pool {
 public:
  explicit Pool(std::size_t threads) : seats_(std::make_unique<Seat[]>(threads)) {
    for (std::size_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  std::size_t threads() const { return workers_.size() + 1; }

  /// body(item, thread) for every item < count, in no order; thread < threads().
  template <class Body>
  void each(std::size_t count, const Body& body) {
    if (workers_.empty() || count < 2) {
      for (std::size_t i = 0; i < count; ++i) body(i, 0);
      return;
    }
    // No helper is at work: it left the last loop, or found it closed.
    body_ = &body;  // no std::function: it would allocate
    call_ = [](const void* b, std::size_t i, std::size_t t) { (*static_cast<const Body*>(b))(i, t); };
    const auto begin = [&](std::size_t t) { return (count * t + threads() - 1) / threads(); };
    for (std::size_t t = 0; t < threads(); ++t) {
      seats_[t].next.store(begin(t), std::memory_order_relaxed);
      seats_[t].end = begin(t + 1);
    }
    open();
    take(0);
    close();
  }

  /// A loop is soon to come: helpers that sleep begin to look for it.
  void wake() {
    if (workers_.empty()) return;
    open();
    close();
  }

 private:
  static constexpr int kLooks = 4000;  // some 50 to 100 microseconds

  /// A thread's own items, and whether it is at work: each on a cache line that nobody else writes for long.
  struct alignas(64) Seat {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
    alignas(64) std::atomic<bool> inside{false};
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  void open() {
    round_.fetch_add(1);  // to odd
    if (sleeping_.load() == 0) return;
    const std::lock_guard lock(mutex_);  // whoever is about to sleep has looked at round_ under it
    wake_.notify_all();
  }

  void close() {
    round_.fetch_add(1);  // to even
    // Sequentially consistent: a helper either sat down before this, or finds the loop closed.
    for (std::size_t t = 1; t < threads(); ++t)
      while (seats_[t].inside.load()) pause();
  }

  /// One's own items, then what is left of the others'.
  void take(std::size_t thread) {
    for (std::size_t k = 0, owner = thread; k < threads();
         ++k, owner = owner + 1 < threads() ? owner + 1 : 0) {
      Seat& seat = seats_[owner];
      while (seat.next.load(std::memory_order_relaxed) < seat.end) {
        const std::size_t i = seat.next.fetch_add(1, std::memory_order_relaxed);
        if (i < seat.end) call_(body_, i, thread);
      }
    }
  }

  /// The round that is not `seen`, or `seen` when the pool ends.
  std::size_t next_round(std::size_t seen) {
    for (int look = 0; look < kLooks; ++look) {
      const std::size_t round = round_.load();
      if (round != seen) return round;
      pause();
    }
    std::unique_lock lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return stop_.load() || round_.load() != seen; });
    sleeping_.fetch_sub(1);
    return stop_.load() ? seen : round_.load();
  }

  void work(std::size_t thread) {
    std::atomic<bool>& inside = seats_[thread].inside;
    for (std::size_t seen = 0, round; (round = next_round(seen)) != seen; seen = round) {
      if (round % 2 == 0) continue;
      inside.store(true);
      // A later loop is as good; a closed one has nothing.
      if (round_.load() % 2 != 0) take(thread);
      inside.store(false);
    }
  }

  std::vector<std::thread> workers_;
  std::unique_ptr<Seat[]> seats_;
  std::mutex mutex_;
  std::condition_variable wake_;
  const void* body_ = nullptr;
  void (*call_)(const void*, std::size_t, std::size_t) = nullptr;
  alignas(64) std::atomic<std::size_t> round_{0};  // odd while a loop is open
  alignas(64) std::atomic<std::size_t> sleeping_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace blindtail
