// Vectors of floats as wide as the CPU has them, and loading them from what keys are stored in.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Half.h>

#include <cstring>

// One library serves every x86 CPU: the loader picks the widest of these. Sanitizers are not ready yet when it does.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define CLONE_FOR_WIDER_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONE_FOR_WIDER_VECTORS
#endif
#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace vllm_qfilters {

// The compiler maps these to whatever registers the CPU has.
constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfWords __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes * sizeof(uint8_t))));

ALWAYS_INLINE void load_words(const void* from, Words& words) {
  HalfWords half_words;
  std::memcpy(&half_words, from, sizeof(half_words));
  words = __builtin_convertvector(half_words, Words);
}

ALWAYS_INLINE void load_bytes(const void* from, Words& words) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  words = __builtin_convertvector(bytes, Words);
}

ALWAYS_INLINE void load(const float* from, Floats& floats) {
  std::memcpy(&floats, from, sizeof(floats));
}

ALWAYS_INLINE void load(const c10::BFloat16* from, Floats& floats) {
  Words words;
  load_words(from, words);
  floats = reinterpret_cast<Floats>(words << 16);
}

// Of float16 bit patterns.
ALWAYS_INLINE void widen_halves(const Words& words, Floats& floats) {
  const Words magnitude = (words & 0x7fff) << 13;
  floats = reinterpret_cast<Floats>(magnitude) * 0x1p112f;  // moves the exponent from float16's bias to float32's
  const Words infinity_or_nan = reinterpret_cast<Words>(magnitude >= 0x7c00u << 13) & 0x7f800000u;
  floats = reinterpret_cast<Floats>(reinterpret_cast<Words>(floats) | (words & 0x8000) << 16 | infinity_or_nan);
}

ALWAYS_INLINE void load(const c10::Half* from, Floats& floats) {
  Words words;
  load_words(from, words);
  widen_halves(words, floats);
}

// The higher byte of a float16.
ALWAYS_INLINE void load(const c10::Float8_e5m2* from, Floats& floats) {
  Words words;
  load_bytes(from, words);
  widen_halves(words << 8, floats);
}

// Has no infinities, and one NaN of each sign.
ALWAYS_INLINE void load(const c10::Float8_e4m3fn* from, Floats& floats) {
  Words words;
  load_bytes(from, words);
  const Words magnitude = words & 0x7f;
  floats = reinterpret_cast<Floats>(magnitude << 20) * 0x1p120f;  // moves the exponent from this bias to float32's
  const Words nan = reinterpret_cast<Words>(magnitude == 0x7f) & 0x7fc00000u;
  floats = reinterpret_cast<Floats>(reinterpret_cast<Words>(floats) | (words & 0x80) << 24 | nan);
}

}  // namespace vllm_qfilters
