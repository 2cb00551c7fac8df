// What tests of whole tails share: a ring that is just large enough for rows to be shared in blocks, random
// keys and requests.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "body.hpp"
#include "tail.hpp"

namespace blindtail {

inline constexpr int kLogN = 11;
inline constexpr std::size_t kN = std::size_t{1} << kLogN;
inline const std::vector<KeyShape> kKeys{{0, 2}, {3, 3}, {9, 3}, {5, 2}, {25, 1}, {2 * kN - 1, 0}};

/// Five primes = 1 mod 2N below 2^30, the special one last.
inline std::vector<u64> primes() {
  const auto prime = [](u64 q) {
    for (u64 d = 3; d * d <= q; d += 2)
      if (q % d == 0) return false;
    return true;
  };
  std::vector<u64> found;
  for (u64 q = (u64{1} << 30) - 2 * kN + 1; found.size() < 5; q -= 2 * kN)
    if (prime(q)) found.push_back(q);
  return found;
}

inline const std::vector<u64> kPrimes = primes();

inline std::vector<std::uint8_t> seeded_body(const std::vector<u64>& of, std::mt19937_64& random) {
  std::vector<std::vector<u64>> words(of.size(), std::vector<u64>(kN));
  std::vector<const u64*> rows;
  for (std::size_t j = 0; j < of.size(); ++j) {
    for (u64& word : words[j]) word = random() % of[j];
    rows.push_back(words[j].data());
  }
  std::uint8_t seed[kSeedBytes];
  for (auto& byte : seed) byte = static_cast<std::uint8_t>(random());
  return write_seeded<u64>(of, kN, seed, rows.data());
}

/// Random keys of the shapes above, prepared for a tail.
struct TestKeys {
  std::vector<Buffer<std::uint8_t>> memory;

  std::unique_ptr<Tail::LoadedKeys> load(const Tail& tail, std::mt19937_64& random) {
    std::vector<StoredKey> stored;
    for (const KeyShape& shape : kKeys) {
      std::vector<std::uint8_t> body;
      for (std::size_t digit = 0; digit <= shape.level; ++digit) {
        const auto part = seeded_body(level_primes(kPrimes, shape.level), random);
        body.insert(body.end(), part.begin(), part.end());
      }
      Buffer<std::uint8_t> out(tail.key_bytes(shape.level));
      tail.prepare_key(shape, body, {out.data(), out.size()});
      memory.push_back(std::move(out));
      stored.push_back({shape, {memory.back().data(), memory.back().size()}});
    }
    return tail.load_keys(stored);
  }
};

/// The body of one ciphertext at the highest level.
inline std::vector<std::uint8_t> request(unsigned seed) {
  std::mt19937_64 random(seed);
  return seeded_body({kPrimes.begin(), kPrimes.end() - 1}, random);
}

}  // namespace blindtail
