// Which edges inputs reach in objects compiled with -fsanitize-coverage=trace-pc (see driver.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fuzz {

/// What all inputs together have reached.
class Coverage {
 public:
  explicit Coverage(bool wanted);

  /// An input is tried from now on.
  void begin();
  /// Whether the input that ends here reached something new.
  bool end();
  std::size_t edges() const { return edges_; }
  std::size_t features() const { return features_; }

 private:
  std::vector<std::uint8_t> seen_;  // a bit for each bucket
  bool wanted_;
  std::size_t edges_ = 0, features_ = 0;
};

}  // namespace fuzz
