// Which table of kernels this processor runs.
#include <stdexcept>
#include <string>
#include <string_view>

#include "kernels.hpp"

namespace blindtail {

#if defined(__x86_64__)
const Kernels<u32>& avx2_kernels();
const Kernels<u32>& avx512_kernels();
#endif

namespace {

struct Choice {
  const char* name;
  bool available;
  const Kernels<u32>& (*table)();
};

/// Best first.
const Choice* choices(std::size_t* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const Choice list[] = {
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"),
       avx512_kernels},
      {"avx2", __builtin_cpu_supports("avx2") != 0, avx2_kernels},
      {"portable", true, portable_kernels<u32>},
  };
#else
  static const Choice list[] = {{"portable", true, portable_kernels<u32>}};
#endif
  *count = sizeof(list) / sizeof(list[0]);
  return list;
}

[[noreturn]] void refuse(std::string_view name, const std::string& available) {
  throw std::invalid_argument("no kernels \"" + std::string(name) + "\" here; available: " + available);
}

}  // namespace

template <>
const Kernels<u32>& kernels<u32>(const char* name) {
  std::size_t count = 0;
  const Choice* list = choices(&count);
  std::string available;
  for (std::size_t i = 0; i < count; ++i) {
    if (!list[i].available) continue;
    if (name == nullptr || std::string_view(name) == list[i].name) return list[i].table();
    available += (available.empty() ? "" : ", ") + std::string(list[i].name);
  }
  refuse(name, available);
}

template <>
const Kernels<u64>& kernels<u64>(const char* name) {
  if (name != nullptr && std::string_view(name) != "portable") refuse(name, "portable (64-bit words)");
  return portable_kernels<u64>();
}

}  // namespace blindtail
