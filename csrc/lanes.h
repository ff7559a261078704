// Vectors of floats as wide as the CPU has them, and loading them from what keys are stored in.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Half.h>

#include <cstring>
#include <type_traits>

// One library serves every x86 CPU: the loader picks the widest of these. Sanitizers are not ready yet when it does.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define CLONE_FOR_WIDER_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
// AVX2 alone has no multiplications fused with additions: every clone rounds alike.
#define CLONE_WITHOUT_FMA __attribute__((target_clones("avx2", "default")))
#else
#define CLONE_FOR_WIDER_VECTORS
#define CLONE_WITHOUT_FMA
#endif
#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace vllm_qfilters {

// The compiler maps these to whatever registers the CPU has.
constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfWords __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes * sizeof(uint8_t))));

// What memory is taken in, so that Floats in it never lie across two lines of the cache.
struct alignas(sizeof(Floats)) Line {
  float floats[kLanes] = {};
};

ALWAYS_INLINE void load(const float* from, Floats& floats) {
  std::memcpy(&floats, from, sizeof(floats));
}

ALWAYS_INLINE void store(const Floats& floats, float* to) {
  std::memcpy(to, &floats, sizeof(floats));
}

// Of float16 bit patterns.
ALWAYS_INLINE void widen_halves(const Words& words, Floats& floats) {
  const Words magnitude = (words & 0x7fff) << 13;
  floats = reinterpret_cast<Floats>(magnitude) * 0x1p112f;  // moves the exponent from float16's bias to float32's
  const Words infinity_or_nan = reinterpret_cast<Words>(magnitude >= 0x7c00u << 13) & 0x7f800000u;
  floats = reinterpret_cast<Floats>(reinterpret_cast<Words>(floats) | (words & 0x8000) << 16 | infinity_or_nan);
}

// Of bit patterns of an Element, one in each word.
template <typename Element>
ALWAYS_INLINE void widen(const Words& words, Floats& floats) {
  if constexpr (std::is_same_v<Element, c10::BFloat16>) {
    floats = reinterpret_cast<Floats>(words << 16);
  } else if constexpr (std::is_same_v<Element, c10::Half>) {
    widen_halves(words, floats);
  } else if constexpr (std::is_same_v<Element, c10::Float8_e5m2>) {  // the higher byte of a float16
    widen_halves(words << 8, floats);
  } else {  // Float8_e4m3fn has no infinities, and one NaN of each sign
    const Words magnitude = words & 0x7f;
    floats = reinterpret_cast<Floats>(magnitude << 20) * 0x1p120f;  // moves the exponent from this bias to float32's
    const Words nan = reinterpret_cast<Words>(magnitude == 0x7f) & 0x7fc00000u;
    floats = reinterpret_cast<Floats>(reinterpret_cast<Words>(floats) | (words & 0x80) << 24 | nan);
  }
}

// Unsigned integers of as many bytes as an Element has, and of twice as many.
template <typename Element>
using Patterns = std::conditional_t<sizeof(Element) == 1, Bytes, HalfWords>;
template <typename Element>
using PatternPairs = std::conditional_t<sizeof(Element) == 1, HalfWords, Words>;

template <typename Element>
ALWAYS_INLINE void load(const Element* from, Floats& floats) {
  Patterns<Element> patterns;
  std::memcpy(&patterns, from, sizeof(patterns));
  widen<Element>(__builtin_convertvector(patterns, Words), floats);
}

// Elements 0, 2, 4, ... become firsts, those behind them seconds.
template <typename Element>
ALWAYS_INLINE void load_pairs(const Element* from, Floats& firsts, Floats& seconds) {
  constexpr int kBits = 8 * sizeof(Element);
  PatternPairs<Element> pairs;
  std::memcpy(&pairs, from, sizeof(pairs));
  const Words words = __builtin_convertvector(pairs, Words);
  widen<Element>(words & ((1u << kBits) - 1), firsts);
  widen<Element>(words >> kBits, seconds);
}

}  // namespace vllm_qfilters
