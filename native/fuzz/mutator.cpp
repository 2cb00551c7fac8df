#include "mutator.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace fuzz {

Bytes Mutator::next() {
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

Bytes Mutator::copied(const Bytes& from, Piece what) {
  const auto at = from.begin() + static_cast<std::ptrdiff_t>(what.at);
  return Bytes(at, at + static_cast<std::ptrdiff_t>(what.count));
}

void Mutator::insert(Bytes& into, const Bytes& more) {
  into.insert(into.begin() + static_cast<std::ptrdiff_t>(place(into.size() + 1)), more.begin(), more.end());
}

void Mutator::overwrite(Bytes& into, const Bytes& with) {
  const std::size_t at = place(into.size());
  std::copy_n(with.begin(), std::min(with.size(), into.size() - at),
              into.begin() + static_cast<std::ptrdiff_t>(at));
}

template <class Change>
void Mutator::integer(Bytes& bytes, Change change) {
  const std::size_t width = std::size_t{1} << below(4);
  if (bytes.size() < width) return;
  std::uint8_t* at = bytes.data() + place(bytes.size() - width + 1);
  std::uint64_t value = 0;
  std::memcpy(&value, at, width);
  value = change(value);
  std::memcpy(at, &value, width);
}

void Mutator::mutate(Bytes& bytes) {
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

}  // namespace fuzz
