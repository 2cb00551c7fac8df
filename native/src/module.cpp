// The Python module blindtail.he._native: numpy arrays and bytes in and out, the GIL released while it works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "body.hpp"
#include "exact.hpp"
#include "tail.hpp"
#include "timing.hpp"

namespace nb = nanobind;
using namespace blindtail;

namespace {

using ByteArray = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableByteArray = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<const u64, nb::c_contig, nb::device::cpu>;
using Giants = std::vector<std::vector<std::pair<std::size_t, std::size_t>>>;

std::span<const std::uint8_t> span(const ByteArray& a) { return {a.data(), a.size()}; }

nb::ndarray<nb::numpy, u64> array(std::vector<u64>&& words, std::initializer_list<std::size_t> shape) {
  auto* kept = new std::vector<u64>(std::move(words));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<u64>*>(p); });
  return nb::ndarray<nb::numpy, u64>(kept->data(), shape, owner);
}

const char* name_or_null(const std::string& name) { return name.empty() ? nullptr : name.c_str(); }

/// Loaded keys and the memory they point into.
struct KeyHandle {
  std::unique_ptr<Tail::LoadedKeys> keys;
  ByteArray memory;
};

/// Imaginary parts, which may be missing; an empty array would pass for that.
std::span<const double> given(const std::optional<Doubles>& imaginary) {
  if (!imaginary) return {};
  if (imaginary->size() == 0) throw std::invalid_argument("imaginary parts of no diagonals");
  return {imaginary->data(), imaginary->size()};
}

class PyTail {
 public:
  PyTail(int log_n, const std::vector<u64>& primes, const std::string& instructions, int word_bits,
         std::size_t inputs)
      : tail_(make_tail(log_n, primes, name_or_null(instructions), word_bits, inputs)) {}

  void add_map(std::size_t level, const std::vector<u32>& babies, const Giants& giants, u32 giant,
               const std::vector<std::vector<u32>>& folds, const Doubles& diagonals, double plain_scale,
               const Doubles& bias, double bias_scale, const std::optional<Doubles>& imaginary,
               const Sources& inputs, const Sources& sources) {
    const MapDescription map{level,       babies,
                             giants,      giant,
                             folds,       {diagonals.data(), diagonals.size()},
                             plain_scale, {bias.data(), bias.size()},
                             bias_scale,  given(imaginary),
                             inputs,      sources};
    const nb::gil_scoped_release released;
    tail_->add_map(map);
  }

  void encode_map(std::size_t level, const Doubles& diagonals, double plain_scale, const Doubles& bias,
                  double bias_scale, const MutableByteArray& out, const std::optional<Doubles>& imaginary) {
    const MapDescription map{level,       {},
                             {},          1,
                             {},          {diagonals.data(), diagonals.size()},
                             plain_scale, {bias.data(), bias.size()},
                             bias_scale,  given(imaginary)};
    const nb::gil_scoped_release released;
    tail_->encode_map(map, {out.data(), out.size()});
  }

  void add_encoded_map(std::size_t level, const std::vector<u32>& babies, const Giants& giants, u32 giant,
                       const std::vector<std::vector<u32>>& folds, const ByteArray& encoded,
                       const Sources& inputs, const Sources& sources) {
    encoded_.push_back(encoded);
    const MapDescription map{level, babies, giants, giant, folds, {}, 1, {}, 1, {}, inputs, sources};
    tail_->add_encoded_map(map, span(encoded));
  }

  void add_sum(std::size_t level, const Sources& sources, const std::optional<Doubles>& constant,
               double scale) {
    tail_->add_sum(level, sources, given(constant), scale);
  }

  void prepare_key(u32 element, std::size_t level, const ByteArray& body, const MutableByteArray& out) const {
    const nb::gil_scoped_release released;
    tail_->prepare_key({element, level}, span(body), {out.data(), out.size()});
  }

  std::unique_ptr<KeyHandle> load_keys(const ByteArray& memory,
                                       const std::vector<std::pair<u32, std::size_t>>& shapes) const {
    std::vector<StoredKey> stored;
    std::size_t at = 0;
    for (const auto& [element, level] : shapes) {
      const std::size_t bytes = tail_->key_bytes(level);
      if (bytes > memory.size() - at)
        throw std::invalid_argument("prepared keys are shorter than their shapes");
      stored.push_back({{element, level}, span(memory).subspan(at, bytes)});
      at += bytes;
    }
    if (at != memory.size()) throw std::invalid_argument("prepared keys are longer than their shapes");
    return std::make_unique<KeyHandle>(KeyHandle{tail_->load_keys(stored), memory});
  }

  nb::bytes evaluate(const KeyHandle& keys, const ByteArray& body, std::size_t threads) {
    std::vector<std::uint8_t> reply;
    {
      const nb::gil_scoped_release released;
      reply = tail_->evaluate(*keys.keys, span(body), checked(threads));
    }
    return nb::bytes(reply.data(), reply.size());
  }

  std::unique_ptr<Tail::Ticket> make_ticket(const KeyHandle& keys, const nb::bytes& seed,
                                            std::size_t threads) {
    const std::span<const std::uint8_t> bytes(static_cast<const std::uint8_t*>(seed.data()), seed.size());
    const nb::gil_scoped_release released;
    return tail_->make_ticket(*keys.keys, bytes, checked(threads));
  }

  nb::bytes evaluate_ticket(const KeyHandle& keys, const ByteArray& body, const Tail::Ticket& ticket,
                            std::size_t threads) {
    std::vector<std::uint8_t> reply;
    {
      const nb::gil_scoped_release released;
      reply = tail_->evaluate(*keys.keys, span(body), checked(threads), ticket);
    }
    return nb::bytes(reply.data(), reply.size());
  }

  nb::ndarray<nb::numpy, u64> evaluate_residues(const KeyHandle& keys, const Words& c0, const Words& c1,
                                                std::size_t threads) {
    std::vector<u64> out;
    {
      const nb::gil_scoped_release released;
      out = tail_->evaluate_residues(*keys.keys, {c0.data(), c0.size()}, {c1.data(), c1.size()},
                                     checked(threads));
    }
    const std::size_t outputs = tail_->outputs(), n = out.size() / (2 * outputs);
    if (outputs == 1) return array(std::move(out), {2, n});
    return array(std::move(out), {outputs, 2, n});
  }

  Tail& tail() { return *tail_; }

 private:
  static std::size_t checked(std::size_t threads) {
    if (threads < 1 || threads > 256) throw std::invalid_argument("between 1 and 256 threads");
    return threads;
  }

  std::vector<ByteArray> encoded_;  // what the tail reads in place; outlives it
  std::unique_ptr<Tail> tail_;
};

/// SEAL's operations on arrays (polynomials, primes, N) of uint64.
class PyExact {
 public:
  PyExact(const PyExact&) = delete;
  PyExact(int log_n, const std::vector<u64>& primes, const std::string& instructions, int word_bits) {
    if (word_bits == 32)
      narrow_.emplace(log_n, primes, name_or_null(instructions));
    else
      wide_.emplace(log_n, primes, "portable");
  }

  template <class F>
  nb::ndarray<nb::numpy, u64> with(const F& f) const {
    return narrow_ ? f(*narrow_) : f(*wide_);
  }

  nb::ndarray<nb::numpy, u64> add(const Words& a, const Words& b) const {
    return with([&](const auto& chain) { return out(exact_add(chain, in(chain, a), in(chain, b))); });
  }
  nb::ndarray<nb::numpy, u64> multiply_plain(const Words& a, const Words& b) const {
    return with(
        [&](const auto& chain) { return out(exact_multiply_plain(chain, in(chain, a), in(chain, b))); });
  }
  nb::ndarray<nb::numpy, u64> multiply(const Words& a, const Words& b) const {
    return with([&](const auto& chain) { return out(exact_multiply(chain, in(chain, a), in(chain, b))); });
  }
  nb::ndarray<nb::numpy, u64> rescale(const Words& a) const {
    return with([&](const auto& chain) { return out(exact_rescale(chain, in(chain, a))); });
  }
  nb::ndarray<nb::numpy, u64> mod_switch(const Words& a) const {
    return with([&](const auto& chain) { return out(exact_mod_switch(in(chain, a))); });
  }
  nb::ndarray<nb::numpy, u64> relinearise(const Words& a, const std::vector<Words>& key) const {
    return with(
        [&](const auto& chain) { return out(exact_relinearise(chain, in(chain, a), keyed(chain, key))); });
  }
  nb::ndarray<nb::numpy, u64> rotate(const Words& a, u32 element, const std::vector<Words>& key) const {
    return with([&](const auto& chain) {
      return out(exact_rotate(chain, in(chain, a), element, keyed(chain, key)));
    });
  }

 private:
  template <class W>
  static Polynomials<W> in(const Chain<W>& chain, const Words& a) {
    if (a.ndim() != 3 || a.shape(2) != chain.n || a.shape(0) < 1 || a.shape(1) < 1 ||
        a.shape(1) > chain.primes.size())
      throw std::invalid_argument("an array of shape (polynomials, primes, N)");
    Polynomials<W> made(a.shape(0), a.shape(1), chain.n);
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (a.data()[i] >= chain.mod(i / chain.n % a.shape(1)).q)
        throw std::invalid_argument("a residue beyond its prime");
      made.words[i] = static_cast<W>(a.data()[i]);
    }
    return made;
  }
  template <class W>
  static SealKey<W> keyed(const Chain<W>& chain, const std::vector<Words>& key) {
    SealKey<W> made;
    for (const Words& digit : key) made.push_back(in(chain, digit));
    return made;
  }
  template <class W>
  static nb::ndarray<nb::numpy, u64> out(const Polynomials<W>& a) {
    return array(std::vector<u64>(a.words.data(), a.words.data() + a.words.size()), {a.count, a.rows, a.n});
  }

  std::optional<Chain<u32>> narrow_;
  std::optional<Chain<u64>> wide_;
};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  for (const char* name : {"avx512", "avx2", "portable"}) {
    try {
      found.emplace_back(kernels<u32>(name).name);
    } catch (const std::invalid_argument&) {
    }
  }
  return found;
}

/// The engine's parts against the clock, for benchmarks and predictions.
class PyTimer {
 public:
  PyTimer(int log_n, const std::vector<u64>& primes, const std::string& instructions, int word_bits,
          std::size_t rotations, std::size_t threads) {
    const nb::gil_scoped_release released;
    if (word_bits == 32)
      narrow_.emplace(log_n, primes, name_or_null(instructions), rotations, threads);
    else
      wide_.emplace(log_n, primes, "portable", rotations, threads);
  }
  std::vector<double> run(const std::string& part, std::size_t times) {
    const nb::gil_scoped_release released;
    return narrow_ ? narrow_->run(part, times) : wide_->run(part, times);
  }
  /// (open, expand, decompose, rotations, low, copies, products, divide) of each.
  std::vector<std::array<double, 8>> stages(std::size_t bytes, std::size_t rotations, std::size_t diagonals,
                                            std::size_t times) {
    const nb::gil_scoped_release released;
    std::vector<std::array<double, 8>> found;
    const auto take = [&](auto& timer) {
      for (const auto& one : timer.stages(bytes, rotations, diagonals, times))
        found.push_back({one.open, one.expand, one.decompose, one.rotations, one.low, one.copies,
                         one.products, one.divide});
    };
    narrow_ ? take(*narrow_) : take(*wide_);
    return found;
  }

 private:
  std::optional<EngineTimer<u32>> narrow_;
  std::optional<EngineTimer<u64>> wide_;
};

void time_kernels(nb::module_& module) {
  nb::class_<PyTimer>(module, "Timer")
      .def(nb::init<int, const std::vector<u64>&, const std::string&, int, std::size_t, std::size_t>(),
           nb::arg("log_n"), nb::arg("primes"), nb::arg("instructions") = "", nb::arg("word_bits") = 32,
           nb::arg("rotations") = 8, nb::arg("threads") = 1)
      .def("run", &PyTimer::run, nb::arg("part"), nb::arg("times"))
      .def("stages", &PyTimer::stages, nb::arg("bytes"), nb::arg("rotations"), nb::arg("diagonals"),
           nb::arg("times"));
}

}  // namespace

NB_MODULE(_native, module) {
  time_kernels(module);
  module.def("version", [] { return BLINDTAIL_VERSION; });
  module.def("instruction_sets", &instruction_sets);
  nb::exception<BodyError>(module, "BodyError", PyExc_ValueError);

  nb::class_<KeyHandle>(module, "Keys");
  nb::class_<Tail::Ticket>(module, "Ticket").def_prop_ro("bytes", &Tail::Ticket::bytes);
  nb::class_<PyTail>(module, "Tail")
      .def(nb::init<int, const std::vector<u64>&, const std::string&, int, std::size_t>(), nb::arg("log_n"),
           nb::arg("primes"), nb::arg("instructions") = "", nb::arg("word_bits") = 0, nb::arg("inputs") = 1)
      .def("add_map", &PyTail::add_map, nb::arg("level"), nb::arg("babies"), nb::arg("giants"),
           nb::arg("giant"), nb::arg("folds"), nb::arg("diagonals"), nb::arg("plain_scale"), nb::arg("bias"),
           nb::arg("bias_scale"), nb::arg("imaginary") = nb::none(), nb::arg("inputs") = Sources{},
           nb::arg("sources") = Sources{})
      .def(
          "map_bytes",
          [](PyTail& self, std::size_t level, std::size_t diagonals) {
            return self.tail().map_bytes(level, diagonals);
          },
          nb::arg("level"), nb::arg("diagonals"))
      .def("encode_map", &PyTail::encode_map, nb::arg("level"), nb::arg("diagonals"), nb::arg("plain_scale"),
           nb::arg("bias"), nb::arg("bias_scale"), nb::arg("out"), nb::arg("imaginary") = nb::none())
      .def("add_encoded_map", &PyTail::add_encoded_map, nb::arg("level"), nb::arg("babies"),
           nb::arg("giants"), nb::arg("giant"), nb::arg("folds"), nb::arg("encoded"),
           nb::arg("inputs") = Sources{}, nb::arg("sources") = Sources{})
      .def(
          "add_square",
          [](PyTail& self, std::size_t level, const Sources& sources) {
            self.tail().add_square(level, sources);
          },
          nb::arg("level"), nb::arg("sources") = Sources{})
      .def(
          "add_product",
          [](PyTail& self, std::size_t level, const Sources& sources) {
            self.tail().add_product(level, sources);
          },
          nb::arg("level"), nb::arg("sources"))
      .def("add_sum", &PyTail::add_sum, nb::arg("level"), nb::arg("sources"),
           nb::arg("constant") = nb::none(), nb::arg("scale") = 1.0)
      .def(
          "finish",
          [](PyTail& self, std::size_t period, int dropped, std::size_t outputs, std::size_t group_bytes) {
            self.tail().finish(period, dropped, outputs, group_bytes);
          },
          nb::arg("period"), nb::arg("dropped_bits"), nb::arg("outputs") = 1,
          nb::arg("group_bytes") = kGroupBytes)
      .def_prop_ro("groups", [](PyTail& self) { return self.tail().groups(); })
      .def_prop_ro("word_bits", [](PyTail& self) { return self.tail().word_bits(); })
      .def_prop_ro("instructions", [](PyTail& self) { return self.tail().instructions(); })
      .def_prop_ro("plain_bytes", [](PyTail& self) { return self.tail().plain_bytes(); })
      .def(
          "key_bytes", [](PyTail& self, std::size_t level) { return self.tail().key_bytes(level); },
          nb::arg("level"))
      .def("prepare_key", &PyTail::prepare_key, nb::arg("element"), nb::arg("level"), nb::arg("body"),
           nb::arg("out"))
      .def("load_keys", &PyTail::load_keys, nb::arg("memory"), nb::arg("shapes"))
      .def("expect", [](PyTail& self) { self.tail().expect(); })
      .def("evaluate", &PyTail::evaluate, nb::arg("keys"), nb::arg("body"), nb::arg("threads") = 1)
      .def("make_ticket", &PyTail::make_ticket, nb::arg("keys"), nb::arg("seed"), nb::arg("threads") = 1)
      .def("evaluate_ticket", &PyTail::evaluate_ticket, nb::arg("keys"), nb::arg("body"), nb::arg("ticket"),
           nb::arg("threads") = 1)
      .def("evaluate_residues", &PyTail::evaluate_residues, nb::arg("keys"), nb::arg("c0"), nb::arg("c1"),
           nb::arg("threads") = 1);

  nb::class_<PyExact>(module, "Exact")
      .def(nb::init<int, const std::vector<u64>&, const std::string&, int>(), nb::arg("log_n"),
           nb::arg("primes"), nb::arg("instructions") = "", nb::arg("word_bits") = 32)
      .def("add", &PyExact::add, nb::arg("a"), nb::arg("b"))
      .def("multiply_plain", &PyExact::multiply_plain, nb::arg("a"), nb::arg("plain"))
      .def("multiply", &PyExact::multiply, nb::arg("a"), nb::arg("b"))
      .def("relinearise", &PyExact::relinearise, nb::arg("a"), nb::arg("key"))
      .def("rotate", &PyExact::rotate, nb::arg("a"), nb::arg("element"), nb::arg("key"))
      .def("rescale", &PyExact::rescale, nb::arg("a"))
      .def("mod_switch", &PyExact::mod_switch, nb::arg("a"));
}
