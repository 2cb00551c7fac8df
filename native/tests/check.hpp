// What all tests share: checks that are counted, so that one failure does not hide the next.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>

namespace blindtail {

inline int failures = 0;

#define CHECK(what)                                          \
  do {                                                       \
    if (!(what)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #what); \
      if (++failures > 20) std::exit(1);                     \
    }                                                        \
  } while (false)

template <class Error>
bool throws(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error&) {
    return true;
  }
  return false;
}

}  // namespace blindtail
