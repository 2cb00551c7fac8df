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
#include <array>
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
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

// Sanitizers end the process by themselves; the first is called before. Not there without them.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
extern "C" __attribute__((weak)) void __sanitizer_print_stack_trace();

namespace {

using Bytes = std::vector<std::uint8_t>;
using Clock = std::chrono::steady_clock;

// ---- coverage

constexpr int kSlotBits = 18;
constexpr std::size_t kSlots = std::size_t{1} << kSlotBits;

/// Edges of the input tried now: how often each was passed (up to 255), and which at all.
struct Trail {
  std::uint8_t hits[kSlots];
  std::uint32_t touched[kSlots];
  std::size_t count;
  std::uint64_t before;
  bool recording;
};
Trail trail;

}  // namespace

/// Called by instrumented code. Nothing in here is checked or instrumented itself.
extern "C" __attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc() {
  if (!trail.recording) return;
  // Addresses count from this function, so that they do not depend on where the program was loaded.
  const std::uint64_t pc = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)) -
                           reinterpret_cast<std::uintptr_t>(&__sanitizer_cov_trace_pc);
  const std::uint64_t here = (pc * 0x9e3779b97f4a7c15u) >> (64 - kSlotBits);
  const std::uint64_t slot = here ^ trail.before;
  trail.before = here >> 1;  // shifted: A to B is another edge than B to A
  if (trail.hits[slot] == 0) trail.touched[trail.count++] = static_cast<std::uint32_t>(slot);
  if (trail.hits[slot] != 255) ++trail.hits[slot];
}

namespace {

/// What all inputs together have reached.
class Coverage {
 public:
  explicit Coverage(bool wanted) : seen_(kSlots), wanted_(wanted) {}

  void begin() {
    trail.before = 0;
    trail.recording = wanted_;
  }
  /// Whether the input that ends here reached something new.
  bool end() {
    trail.recording = false;
    bool fresh = false;
    for (std::size_t i = 0; i < trail.count; ++i) {
      const std::uint32_t slot = trail.touched[i];
      const std::uint8_t bit = bucket(trail.hits[slot]);
      trail.hits[slot] = 0;
      if (seen_[slot] & bit) continue;
      if (seen_[slot] == 0) ++edges_;
      seen_[slot] |= bit;
      ++features_;
      fresh = true;
    }
    trail.count = 0;
    return fresh;
  }
  std::size_t edges() const { return edges_; }
  std::size_t features() const { return features_; }

 private:
  /// 1, 2, 3, 4 ... 7, 8 ... 15, 16 ... 31, 32 ... 127, more.
  static std::uint8_t bucket(unsigned hits) {
    static constexpr std::array<unsigned, 8> kLast{1, 2, 3, 7, 15, 31, 127, 255};
    return static_cast<std::uint8_t>(1u
                                     << (std::lower_bound(kLast.begin(), kLast.end(), hits) - kLast.begin()));
  }

  std::vector<std::uint8_t> seen_;  // a bit for each bucket
  bool wanted_;
  std::size_t edges_ = 0, features_ = 0;
};

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

/// Copies of inputs with a few changes each.
class Mutator {
 public:
  struct Entry {
    Bytes bytes;
    std::uint64_t picked = 0;
  };

  Mutator(std::uint64_t seed, std::size_t max_len) : random_(seed), max_len_(max_len) {}

  std::vector<Entry> corpus;

  Bytes next() {
    // Of two the one that was picked less often: finds get their turn at once.
    Entry &one = corpus[below(corpus.size())], &other = corpus[below(corpus.size())];
    Entry& from = one.picked <= other.picked ? one : other;
    ++from.picked;
    Bytes made = from.bytes;
    do mutate(made);
    while (below(2) == 0);
    if (made.size() > max_len_) made.resize(max_len_);
    return made;
  }

  std::uint64_t below(std::uint64_t bound) { return random_() % bound; }

 private:
  /// A place in `size` bytes, often one near the start, where headers are.
  std::size_t place(std::size_t size) {
    return below(below(4) == 0 ? std::min<std::size_t>(size, 16) : size);
  }

  struct Piece {
    std::size_t at, count;
  };
  /// One of 1, 2, 4, ... 256 bytes, as far as there are so many.
  Piece piece(std::size_t size) {
    const std::size_t at = place(size);
    return {at, std::min<std::size_t>(size - at, std::size_t{1} << below(9))};
  }

  Bytes copied(const Bytes& from, Piece what) {
    const auto at = from.begin() + static_cast<std::ptrdiff_t>(what.at);
    return Bytes(at, at + static_cast<std::ptrdiff_t>(what.count));
  }

  void insert(Bytes& into, const Bytes& more) {
    into.insert(into.begin() + static_cast<std::ptrdiff_t>(place(into.size() + 1)), more.begin(), more.end());
  }

  void overwrite(Bytes& into, const Bytes& with) {
    const std::size_t at = place(into.size());
    std::copy_n(with.begin(), std::min(with.size(), into.size() - at),
                into.begin() + static_cast<std::ptrdiff_t>(at));
  }

  /// Bytes at a place, read as an integer of 1, 2, 4 or 8, and written back.
  template <class Change>
  void integer(Bytes& bytes, Change change) {
    const std::size_t width = std::size_t{1} << below(4);
    if (bytes.size() < width) return;
    std::uint8_t* at = bytes.data() + place(bytes.size() - width + 1);
    std::uint64_t value = 0;
    std::memcpy(&value, at, width);
    value = change(value);
    std::memcpy(at, &value, width);
  }

  void mutate(Bytes& bytes) {
    static constexpr std::uint64_t kEdges[] = {0,      1,          0x7f,       0x80,       0xff,
                                               0x7fff, 0x8000,     0xffff,     0x7fffffff, 0x80000000,
                                               ~0u,    ~0ull >> 1, 1ull << 63, ~0ull};
    switch (bytes.empty() ? 0 : below(12)) {
      case 0: {
        Bytes more(1 + below(32));
        for (auto& byte : more) byte = static_cast<std::uint8_t>(random_());
        insert(bytes, more);
        break;
      }
      case 1:
        bytes[place(bytes.size())] ^= static_cast<std::uint8_t>(1u << below(8));
        break;
      case 2:
        bytes[place(bytes.size())] = static_cast<std::uint8_t>(random_());
        break;
      case 3: {  // a little more or less
        const std::uint64_t by = 1 + below(35), sign = below(2);
        integer(bytes, [&](std::uint64_t value) { return sign ? value + by : value - by; });
        break;
      }
      case 4:
        integer(bytes, [&](std::uint64_t) { return kEdges[below(std::size(kEdges))]; });
        break;
      case 5: {  // remove
        const Piece what = piece(bytes.size());
        const auto at = bytes.begin() + static_cast<std::ptrdiff_t>(what.at);
        bytes.erase(at, at + static_cast<std::ptrdiff_t>(what.count));
        break;
      }
      case 6: {  // its own bytes once more
        const Bytes again = copied(bytes, piece(bytes.size()));
        below(2) ? insert(bytes, again) : overwrite(bytes, again);
        break;
      }
      case 7: {  // bytes of another
        const Bytes& other = any();
        if (other.empty()) break;
        const Bytes of_it = copied(other, piece(other.size()));
        below(2) ? insert(bytes, of_it) : overwrite(bytes, of_it);
        break;
      }
      case 8: {  // the start of this, the end of another, often so that nothing moves
        const Bytes& other = any();
        const std::size_t at = below(bytes.size() + 1);
        const std::size_t from = below(2) ? std::min(at, other.size()) : below(other.size() + 1);
        bytes.resize(at);
        bytes.insert(bytes.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
        break;
      }
      case 9: {  // the length of another, or a power of two; and one more or less
        const std::uint64_t length = below(2) ? any().size() : std::size_t{1} << below(13);
        bytes.resize(std::min<std::uint64_t>(length + below(3) - (length > 0), max_len_));
        break;
      }
      case 10:
        bytes.resize(below(2) ? below(bytes.size()) : bytes.size() - 1);
        break;
      default: {
        const Piece what = piece(bytes.size());
        std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(what.at), what.count,
                    static_cast<std::uint8_t>(below(2) ? 0xff * below(2) : random_()));
      }
    }
  }

  const Bytes& any() { return corpus[below(corpus.size())].bytes; }

  std::mt19937_64 random_;
  std::size_t max_len_;
};

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
  Coverage coverage_;
  Mutator mutator_;
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
