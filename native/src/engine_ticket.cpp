// Tickets: what of a run depends on c1 alone is done ahead.
//
// c1 follows from a request's seed. A map is linear: the sum of rotated inputs times
// diagonals is P L(c0) + T(c1) modulo Q P in its first half and a function of c1 alone in
// its second; so are folds, and of the square that follows only c0^2 and 2 c0 c1 need c0.
// All sums are exact modulo the primes and every rounding happens where the whole run has
// it: a run with a ticket gives the same words as one without.
//
// Of plans that are no chain a ticket holds c1 itself, of every input: seeds need not be expanded again.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "engine.hpp"

namespace blindtail {

template <class W>
std::size_t Engine<W>::ticket_limbs() const {
  if (!chain_only_) return inputs_ * (input_level_ + 1);
  const MapStep<W>& map = *steps_.front().map;
  const std::size_t level = map.level, square = steps_.size() > 1 ? 2 * (level + 1) : 0;
  return (level + 2) + (map.folds.empty() ? 0 : level + 1) + level + square;
}

template <class W>
typename Engine<W>::TicketParts Engine<W>::ticket_parts(W* words) const {
  const MapStep<W>& map = *steps_.front().map;
  TicketParts parts;
  parts.map = words;
  parts.fold = parts.map + (map.level + 2) * n();
  parts.c1 = parts.fold + (map.folds.empty() ? 0 : map.level + 1) * n();
  parts.square0 = parts.c1 + map.level * n();
  parts.square1 = parts.square0 + (map.level + 1) * n();
  return parts;
}

template <class W>
void Engine<W>::make_ticket(const Keys<W>& keys, std::size_t threads, W* words) {
  if (!chain_only_) {
    pool(keys, threads);
    const std::size_t each = (input_level_ + 1) * n();
    for (std::size_t i = 0; i < inputs_; ++i) std::memcpy(words + i * each, kept(i, 1), each * sizeof(W));
    return;
  }
  begin(keys, threads);
  const MapStep<W>& map = *steps_.front().map;
  const std::size_t level = map.level;
  const TicketParts parts = ticket_parts(words);
  const bool square = steps_.size() > 1;
  std::memset(c0_.data(), 0, (level + 1) * n() * sizeof(W));
  decompose(level, c1_.data());
  map_sums(steps_.front(), keys);
  std::memcpy(parts.map, sum(0, 0), (level + 2) * n() * sizeof(W));
  const Form form = square ? Form::kNtt : Form::kCoefficient;
  W* c1 = (square ? c1_ : coef_).data();
  if (map.folds.empty()) {
    mod_down_rescale(level, {{sum(0, 1), c1, form}});
  } else {
    mod_down_rescale(level, {{sum(0, 1), coef_.data(), Form::kCoefficient}});
    std::memset(c0_.data(), 0, level * n() * sizeof(W));
    const std::size_t at = fold_all(map, keys, 0);
    std::memcpy(parts.fold, sum(at, 0), (level + 1) * n() * sizeof(W));
    mod_down(level - 1, {{sum(at, 1), c1, form}});
  }
  std::memcpy(parts.c1, c1, level * n() * sizeof(W));
  if (!square) return;
  std::memset(c0_.data(), 0, level * n() * sizeof(W));
  square_sums(level - 1, keys);
  std::memcpy(parts.square0, sum(0, 0), (level + 1) * n() * sizeof(W));
  std::memcpy(parts.square1, sum(0, 1), (level + 1) * n() * sizeof(W));
}

template <class W>
void Engine<W>::run_ticket(const Keys<W>& keys, std::size_t threads, const W* words) {
  pool(keys, threads);
  if (!chain_only_) {
    const std::size_t each = (input_level_ + 1) * n();
    for (std::size_t i = 0; i < inputs_; ++i) std::memcpy(kept(i, 1), words + i * each, each * sizeof(W));
    run_graph(keys);
    return;
  }
  const MapStep<W>& map = *steps_.front().map;
  const std::size_t level = map.level, below = level - 1, special = chain_.special();
  const TicketParts parts = ticket_parts(const_cast<W*>(words));
  const bool square = steps_.size() > 1;

  // P L(c0) + T(c1): rotations and products of c0 alone, modulo Q; nothing modulo P but T.
  W* total = sum(0, 0);
  pool_->each(level + 2, [&](std::size_t row, std::size_t thread) {
    if (row > level) {
      std::memcpy(total + row * n(), parts.map + row * n(), n() * sizeof(W));
      return;
    }
    map_row_of_c0(map, row, thread, total + row * n());
    const Prime<W>& prime = chain_.primes[row];
    W* at = total + row * n();
    chain_.k.scale(prime, at, at, chain_.value[special][row]);
    chain_.k.add(prime, at, at, parts.map + row * n());
  });
  const bool folds = !map.folds.empty();
  const Form end = square ? Form::kNtt : Form::kCoefficient;
  const W* bias = map.bias.data();
  if (folds)
    mod_down_rescale(level, {{total, c0_.data(), Form::kTimesP}});
  else
    mod_down_rescale(level, {{total, c0_.data(), end, bias}});
  if (folds) {
    pool_->each(below + 2, [&](std::size_t row, std::size_t thread) {
      W* out = total + row * n();
      if (row > below) {
        std::memcpy(out, parts.fold + row * n(), n() * sizeof(W));
        return;
      }
      const Prime<W>& prime = chain_.primes[row];
      W *acc = c0_.data() + row * n(), *before = scratch(thread, 0);
      for (const auto& group : map.folds) {
        std::memcpy(before, acc, n() * sizeof(W));
        for (u32 element : group) chain_.k.permute_add(prime, automorphism(element), 0, acc, before);
      }
      chain_.k.add(prime, out, acc, parts.fold + row * n());
    });
    mod_down(below, {{total, c0_.data(), end, bias}});
  }
  if (!square) {
    std::memcpy(coef_.data(), parts.c1, level * n() * sizeof(W));
    return;
  }

  // c0^2 and 2 c0 c1; the keyswitch of c1^2 is in the ticket.
  pool_->each(below + 2, [&](std::size_t row, std::size_t thread) {
    W *out0 = sum(0, 0) + row * n(), *out1 = sum(0, 1) + row * n();
    std::memcpy(out0, parts.square0 + row * n(), n() * sizeof(W));
    std::memcpy(out1, parts.square1 + row * n(), n() * sizeof(W));
    if (row > below) return;
    const Prime<W>& prime = chain_.primes[row];
    W *d0 = scratch(thread, 0), *d1 = scratch(thread, 1), *d2 = scratch(thread, 2);
    chain_.k.square(prime, d0, d1, d2, c0_.data() + row * n(), parts.c1 + row * n());
    const W p = chain_.value[special][row];
    chain_.k.scale_add(prime, out0, d0, p);
    chain_.k.scale_add(prime, out1, d1, p);
  });
  mod_down_rescale(below,
                   {{sum(0, 0), c0_.data(), Form::kTimesP}, {sum(0, 1), coef_.data(), Form::kCoefficient}});
  run_from(2, keys);
}

/// sum over giant and baby steps of diagonals times rotated c0, one prime.
template <class W>
void Engine<W>::map_row_of_c0(const MapStep<W>& map, std::size_t row, std::size_t thread, W* out) {
  const Prime<W>& prime = chain_.primes[row];
  const W* c0 = c0_.data() + row * n();
  for (std::size_t b = 0; b < map.babies.size(); ++b) {
    W* turned = scratch(thread, kTemporaries + b);
    if (map.babies[b] == 1)
      std::memcpy(turned, c0, n() * sizeof(W));
    else
      chain_.k.permute(automorphism(map.babies[b]), 0, n(), turned, c0);
  }
  const W* in[kMaxTerms];
  const W* plain[2][kMaxTerms];
  W* parts[2] = {scratch(thread, 0), scratch(thread, 1)};
  W* turned = scratch(thread, 2);
  bool first = true;
  const auto same = [](const auto& a, const auto& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](const auto& x, const auto& y) { return x.baby == y.baby; });
  };
  for (std::size_t g = map.giants.size(); g > 0;) {
    // Two giant steps that use the same rotated inputs share their loads.
    const std::size_t many = g > 1 && same(map.giants[g - 1], map.giants[g - 2]) ? 2 : 1;
    const auto& high = map.giants[g - 1];
    const auto& low = map.giants[g - many];
    for (std::size_t at = 0; at < high.size(); at += kMaxTerms) {
      const std::size_t count = std::min(kMaxTerms, high.size() - at);
      for (std::size_t i = 0; i < count; ++i) {
        in[i] = scratch(thread, kTemporaries + high[at + i].baby);
        plain[0][i] = map.plain.data() + (row * map.diagonals + high[at + i].diagonal) * n();
        plain[1][i] = map.plain.data() + (row * map.diagonals + low[at + i].diagonal) * n();
      }
      chain_.k.dot_key(prime, parts[0], parts[1], in, plain[0], plain[1], count, at > 0);
    }
    for (std::size_t i = 0; i < many; ++i) {
      const bool empty = map.giants[g - 1 - i].empty();
      if (first) {
        std::memcpy(out, parts[i], n() * sizeof(W));
        first = false;
        continue;
      }
      chain_.k.permute(automorphism(map.giant), 0, n(), turned, out);
      if (empty)
        std::memcpy(out, turned, n() * sizeof(W));
      else
        chain_.k.add(prime, out, turned, parts[i]);
    }
    g -= many;
  }
}

// Members of this file; engine.cpp has the others.
#define BLINDTAIL_TICKETS(W)                                                  \
  template std::size_t Engine<W>::ticket_limbs() const;                       \
  template typename Engine<W>::TicketParts Engine<W>::ticket_parts(W*) const; \
  template void Engine<W>::make_ticket(const Keys<W>&, std::size_t, W*);      \
  template void Engine<W>::run_ticket(const Keys<W>&, std::size_t, const W*); \
  template void Engine<W>::map_row_of_c0(const MapStep<W>&, std::size_t, std::size_t, W*);

BLINDTAIL_TICKETS(u32)
BLINDTAIL_TICKETS(u64)

}  // namespace blindtail
