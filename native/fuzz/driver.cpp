// Runs a fuzz target where libFuzzer is not at hand (GCC), with the same options and the same last line.
//
//   TARGET [-runs=N] [-max_total_time=S] [-seed=N] [-max_len=N] [-timeout=S] [-coverage=0] [-grow=1]
//          [FOLDER|FILE ...]
//
// Inputs of the folders are tried, then mutated without end, or until either limit. Files are tried as they
// are, and nothing else is done. With -grow=1 finds are written into the first folder.
//
// Objects compiled with -fsanitize-coverage=trace-pc call __sanitizer_cov_trace_pc in every basic block.
// Pairs of blocks that follow each other are counted (edges); an input that reaches a new one, or one so many
// times as none before, is kept and mutated in its turn. Without such objects, or with -coverage=0, mutation
// is blind. Targets run on one thread.
//
// A crash ends the process with 1; the input is then in ./crash-TARGET. An input that takes longer than
// -timeout counts as a crash.
#include <fcntl.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "coverage.hpp"
#include "mutator.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

// Sanitizers end the process by themselves; the first is called before. Not there without them.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
extern "C" __attribute__((weak)) void __sanitizer_print_stack_trace();

namespace {

using fuzz::Bytes;
using Clock = std::chrono::steady_clock;

// ---- crashes

std::string crash_file, crash_message;
const Bytes* tried_now = nullptr;
std::atomic<std::uint64_t> tried = 0;
unsigned timeout_s = 60;

void say(const char* text, std::size_t size) {
  if (::write(2, text, size) < 0) return;
}

/// Signal-safe.
void keep_input() {
  if (tried_now == nullptr) return;
  const int file = ::open(crash_file.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (file < 0) return;
  const bool whole =
      ::write(file, tried_now->data(), tried_now->size()) == static_cast<ssize_t>(tried_now->size());
  ::close(file);
  if (whole) say(crash_message.data(), crash_message.size());
}

void on_signal(int) {
  if (__sanitizer_print_stack_trace != nullptr) __sanitizer_print_stack_trace();
  keep_input();
  ::_exit(1);
}

/// Once a second: is it still the same input?
void on_tick(int) {
  static std::uint64_t last = ~std::uint64_t{0};
  static unsigned ticks = 0;
  const std::uint64_t now = tried.load(std::memory_order_relaxed);
  ticks = now == last ? ticks + 1 : 0;
  last = now;
  if (tried_now == nullptr || ticks < timeout_s) return;
  static constexpr char kSlow[] = "an input took too long\n";
  say(kSlow, sizeof(kSlow) - 1);
  on_signal(SIGALRM);
}

void watch() {
  if (__sanitizer_set_death_callback != nullptr) {
    __sanitizer_set_death_callback(keep_input);
  } else {
    for (const int number : {SIGSEGV, SIGBUS, SIGFPE}) std::signal(number, on_signal);
  }
  for (const int number : {SIGABRT, SIGILL, SIGTRAP}) std::signal(number, on_signal);
  std::signal(SIGALRM, on_tick);
  const itimerval each_second{{1, 0}, {1, 0}};
  ::setitimer(ITIMER_REAL, &each_second, nullptr);
}

// ---- inputs

struct Options {
  std::uint64_t runs = ~std::uint64_t{0};
  std::uint64_t seconds = 0;  // 0: no limit
  std::uint64_t seed = 1;
  std::size_t max_len = 4096;
  bool coverage = true;
  bool grow = false;
  std::vector<std::filesystem::path> folders, files;
};

Bytes read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// ---- a run

class Driver {
 public:
  explicit Driver(const Options& options)
      : options_(options), coverage_(options.coverage), mutator_(options.seed, options.max_len) {}

  void replay() {
    for (const auto& file : options_.files) attempt(read(file));
  }

  void fuzz() {
    std::vector<Bytes> given;
    for (const auto& folder : options_.folders) {
      std::vector<std::filesystem::path> paths;
      for (const auto& entry : std::filesystem::directory_iterator(folder)) paths.push_back(entry.path());
      std::sort(paths.begin(), paths.end());
      for (const auto& path : paths) given.push_back(read(path));
    }
    std::stable_sort(given.begin(), given.end(),
                     [](const Bytes& a, const Bytes& b) { return a.size() < b.size(); });
    for (Bytes& one : given) {
      const bool fresh = attempt(one);
      if (fresh || blind()) mutator_.corpus.push_back({std::move(one)});
    }
    if (mutator_.corpus.empty()) mutator_.corpus.emplace_back();
    const std::size_t kept = mutator_.corpus.size();
    report("INITED");
    while (tried < options_.runs && !late()) {
      Bytes next = mutator_.next();
      if (attempt(next)) {
        if (options_.grow) write(next);
        mutator_.corpus.push_back({std::move(next)});
      } else if (blind() && mutator_.below(64) == 0) {
        // Without coverage any mutant is as good as another to build upon.
        if (mutator_.corpus.size() < kept + 256)
          mutator_.corpus.push_back({std::move(next)});
        else
          mutator_.corpus[kept + mutator_.below(256)] = {std::move(next)};
      }
      if (tried >= 1 << 16 && (tried & (tried - 1)) == 0) report("pulse");
    }
    report("DONE");
  }

 private:
  bool blind() const { return coverage_.edges() == 0; }
  double elapsed() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  bool late() const { return options_.seconds != 0 && elapsed() >= static_cast<double>(options_.seconds); }

  /// Whether the input reached something new.
  bool attempt(const Bytes& input) {
    // A copy of the exact size, so that a read past its end is seen by AddressSanitizer.
    auto* copy = static_cast<std::uint8_t*>(std::malloc(input.empty() ? 1 : input.size()));
    if (copy == nullptr) throw std::bad_alloc();
    if (!input.empty()) std::memcpy(copy, input.data(), input.size());
    tried_now = &input;
    coverage_.begin();
    try {
      LLVMFuzzerTestOneInput(copy, input.size());
    } catch (...) {
      keep_input();
      throw;
    }
    const bool fresh = coverage_.end();
    tried_now = nullptr;
    std::free(copy);
    tried.fetch_add(1, std::memory_order_relaxed);
    return fresh;
  }

  /// libFuzzer's words: cov is edges, ft edges told apart by how often they were passed, corp inputs kept.
  void report(const char* what) const {
    const double seconds = elapsed();
    std::printf("#%llu\t%s cov: %zu ft: %zu corp: %zu exec/s: %.0f\n",
                static_cast<unsigned long long>(tried.load()), what, coverage_.edges(), coverage_.features(),
                mutator_.corpus.size(), static_cast<double>(tried) / std::max(seconds, 1e-3));
    std::fflush(stdout);
  }

  void write(const Bytes& input) const {
    std::uint64_t name = 0xcbf29ce484222325u;  // FNV-1a
    for (const std::uint8_t byte : input) name = (name ^ byte) * 0x100000001b3u;
    char text[17];
    std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(name));
    std::ofstream file(options_.folders.front() / text, std::ios::binary);
    file.write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size()));
    if (!file.flush()) throw std::runtime_error("cannot write to " + options_.folders.front().string());
  }

  const Options& options_;
  fuzz::Coverage coverage_;
  fuzz::Mutator mutator_;
  Clock::time_point start_ = Clock::now();
};

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string word = arguments[i];
    if (!word.starts_with('-')) {
      (std::filesystem::is_directory(word) ? options.folders : options.files).emplace_back(word);
      continue;
    }
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const std::uint64_t value = equals == word.npos ? 1 : std::stoull(word.substr(equals + 1));
    if (name == "-runs") {
      options.runs = value;
    } else if (name == "-max_total_time") {
      options.seconds = value;
    } else if (name == "-seed") {
      options.seed = value;
    } else if (name == "-max_len") {
      options.max_len = value;
    } else if (name == "-timeout") {
      timeout_s = static_cast<unsigned>(value);
    } else if (name == "-coverage") {
      options.coverage = value != 0;
    } else if (name == "-grow") {
      options.grow = value != 0;
    } else {
      throw std::runtime_error("unknown option " + word);
    }
  }
  if (options.grow && options.folders.empty()) throw std::runtime_error("-grow=1 needs a folder");
  return options;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options = parse(count, arguments);
    crash_file = "crash-" + std::filesystem::path(arguments[0]).filename().string();
    crash_message = "the input is kept in ./" + crash_file + "\n";
    watch();
    Driver driver(options);
    if (options.files.empty())
      driver.fuzz();
    else
      driver.replay();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
