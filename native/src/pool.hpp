// Threads for one evaluation: the caller works too, the others wait between phases.
//
// A run has some fifty phases of 10 to 500 microseconds, and waking a sleeping thread takes as
// long as a short one. So helpers look for the next phase for a while before they sleep, and
// the caller never waits for one that came too late to find work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

namespace blindtail {

/// Runs loops over independent items. Not reentrant: one loop at a time. Bodies must not throw.
class Pool {
 public:
  explicit Pool(std::size_t threads) {
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
    // No helper is inside: `take` of the last loop ended, or it found the loop closed.
    body_ = &body;  // no std::function: it would allocate
    call_ = [](const void* b, std::size_t i, std::size_t t) { (*static_cast<const Body*>(b))(i, t); };
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    round_.fetch_add(1);
    if (sleeping_.load() > 0) {
      const std::lock_guard lock(mutex_);  // whoever is about to sleep has looked at round_ under it
      wake_.notify_all();
    }
    take(0);
    open_.store(false);
    // Sequentially consistent: a helper either counted itself before this, or finds the loop closed.
    while (inside_.load() > 0) pause();
  }

 private:
  static constexpr int kLooks = 4000;  // some 50 to 100 microseconds

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  void take(std::size_t thread) {
    for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
      call_(body_, i, thread);
  }

  /// False when the pool ends.
  bool wait_for_round(std::size_t seen) {
    for (int look = 0; look < kLooks; ++look) {
      if (round_.load() != seen) return true;
      pause();
    }
    std::unique_lock lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return stop_.load() || round_.load() != seen; });
    sleeping_.fetch_sub(1);
    return !stop_.load();
  }

  void work(std::size_t thread) {
    std::size_t seen = 0;
    while (wait_for_round(seen)) {
      seen = round_.load();
      inside_.fetch_add(1);
      if (open_.load()) take(thread);
      inside_.fetch_sub(1);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  const void* body_ = nullptr;
  void (*call_)(const void*, std::size_t, std::size_t) = nullptr;
  std::size_t count_ = 0;
  alignas(64) std::atomic<std::size_t> next_{0};
  alignas(64) std::atomic<std::size_t> round_{0};
  std::atomic<std::size_t> inside_{0}, sleeping_{0};
  std::atomic<bool> open_{false}, stop_{false};
};

}  // namespace blindtail
