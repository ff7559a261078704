#include "key_tiles.h"

#include <cmath>

namespace vllm_qfilters {
namespace {

constexpr int64_t kVectorsAtOnce = 4;  // with kTile tokens they fill the registers of AVX-512

// x becomes e^x for x <= 0, to within two units in the last place down to e^-87: x = n ln 2 + r, and a polynomial in r.
ALWAYS_INLINE void exponentiate(Floats& x) {
  constexpr float kLowest = -87.0f, kToInteger = 0x1.8p23f;
  const Floats lowest = Floats{} + kLowest;
  x = x < lowest ? lowest : x;
  const Floats shifted = x * 0x1.715476p0f + kToInteger;
  const Floats n = shifted - kToInteger;
  const Floats r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  Floats sum = r * (1.0f / 720) + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  // The last bits of what was shifted are n; the exponent of a float32 is n + 127.
  x = sum * reinterpret_cast<Floats>((reinterpret_cast<Words>(shifted) + 127) << 23);
}

template <typename Element>
ALWAYS_INLINE void widen(const Element* from, int64_t count, float* floats) {
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    Floats part;
    load(from + index, part);
    std::memcpy(floats + index, &part, sizeof(part));
  }
  for (; index < count; ++index) {
    floats[index] = static_cast<float>(from[index]);
  }
}

}  // namespace

CLONE_FOR_WIDER_VECTORS
void to_floats(const float* from, int64_t count, float* floats) {
  widen(from, count, floats);
}

CLONE_FOR_WIDER_VECTORS
void to_floats(const c10::BFloat16* from, int64_t count, float* floats) {
  widen(from, count, floats);
}

CLONE_FOR_WIDER_VECTORS
void to_floats(const c10::Half* from, int64_t count, float* floats) {
  widen(from, count, floats);
}

CLONE_FOR_WIDER_VECTORS
void to_floats(const c10::Float8_e4m3fn* from, int64_t count, float* floats) {
  widen(from, count, floats);
}

CLONE_FOR_WIDER_VECTORS
void to_floats(const c10::Float8_e5m2* from, int64_t count, float* floats) {
  widen(from, count, floats);
}

CLONE_FOR_WIDER_VECTORS
void project_tile(
    const float* vectors, int64_t num_vectors, const float* keys, int64_t key_stride, int64_t head_size, float* out) {
  for (int64_t first = 0; first < num_vectors; first += kVectorsAtOnce) {
    const int64_t count = std::min(kVectorsAtOnce, num_vectors - first);
    Floats sums[kVectorsAtOnce][kTile / kLanes] = {};
    for (int64_t dim = 0; dim < head_size; ++dim) {
      Floats key[kTile / kLanes];
      for (int64_t part = 0; part < kTile / kLanes; ++part) {
        load(keys + dim * key_stride + part * kLanes, key[part]);
      }
      for (int64_t vector = 0; vector < kVectorsAtOnce; ++vector) {
        const float element = vectors[(first + std::min(vector, count - 1)) * head_size + dim];
        for (int64_t part = 0; part < kTile / kLanes; ++part) {
          sums[vector][part] += element * key[part];
        }
      }
    }
    std::memcpy(out + first * kTile, sums, count * kTile * sizeof(float));
  }
}

CLONE_FOR_WIDER_VECTORS
void softmax(float* logits, int64_t count, float sink) {
  const int64_t whole = count / kLanes * kLanes;  // the rest goes lane by lane
  Floats lanes = Floats{} - __builtin_inff();
  for (int64_t first = 0; first < whole; first += kLanes) {
    Floats part;
    load(logits + first, part);
    lanes = part > lanes ? part : lanes;
  }
  for (int64_t index = whole; index < count; ++index) {
    lanes[0] = std::max(lanes[0], logits[index]);
  }
  float highest = lanes[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    highest = std::max(highest, lanes[lane]);
  }
  highest = std::max(highest, sink);
  Floats sums = {};
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t size = std::min(kLanes, count - first) * sizeof(float);
    Floats part = {};
    std::memcpy(&part, logits + first, size);
    part -= highest;
    exponentiate(part);
    std::memcpy(logits + first, &part, size);
    if (first < whole) {
      sums += part;
    }
  }
  float sum = std::exp(sink - highest);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += sums[lane];
  }
  for (int64_t index = whole; index < count; ++index) {
    sum += logits[index];
  }
  for (int64_t index = 0; index < count; ++index) {
    logits[index] /= sum;
  }
}

void soften(float* logits, int64_t count, float cap) {
  for (int64_t index = 0; index < count; ++index) {
    logits[index] = cap * std::tanh(logits[index] / cap);
  }
}

}  // namespace vllm_qfilters
