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
ALWAYS_INLINE void widen_all(
    const Element* page, const RowPlaces& places, int64_t num_rows, int64_t first, int64_t count, float* rows,
    int64_t stride) {
  const int64_t* offsets = places.offsets + first;
  if (places.layout == RowLayout::kByRow) {
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t index = 0; index < count; index += kLanes) {
        Floats part;
        load(page + offsets[row * places.row_size + index], part);
        store(part, rows + row * stride + index);
      }
    }
  } else if constexpr (sizeof(Element) < sizeof(float)) {
    for (int64_t index = 0; index < count; index += kLanes) {
      for (int64_t row = 0; row < num_rows; row += 2) {
        Floats even, odd;
        load_pairs(page + offsets[row * places.row_size + index], even, odd);
        store(even, rows + row * stride + index);
        store(odd, rows + (row + 1) * stride + index);
      }
    }
  }
}

// The products with kVectors vectors, see project_tile.
template <int64_t kVectors>
ALWAYS_INLINE void project_some(
    const float* vectors, const float* keys, int64_t key_stride, int64_t head_size, float* out) {
  constexpr int64_t kParts = kTile / kLanes;
  Floats sums[kVectors][kParts];
  for (int64_t sum = 0; sum < kVectors * kParts; ++sum) {
    sums[sum / kParts][sum % kParts] = Floats{};
  }
  for (int64_t dim = 0; dim < head_size; ++dim) {
    Floats key[kParts];
    for (int64_t part = 0; part < kParts; ++part) {
      load(keys + dim * key_stride + part * kLanes, key[part]);
    }
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      const float element = vectors[vector * head_size + dim];
      for (int64_t part = 0; part < kParts; ++part) {
        sums[vector][part] += element * key[part];
      }
    }
  }
  for (int64_t sum = 0; sum < kVectors * kParts; ++sum) {
    store(sums[sum / kParts][sum % kParts], out + sum * kLanes);
  }
}

}  // namespace

#define DEFINE_FOR(Element)                                                                                      \
  CLONE_FOR_WIDER_VECTORS                                                                                        \
  void widen_rows(                                                                                               \
      const Element* page, const RowPlaces& places, int64_t num_rows, int64_t first, int64_t count, float* rows, \
      int64_t stride) {                                                                                          \
    widen_all(page, places, num_rows, first, count, rows, stride);                                               \
  }
DEFINE_FOR(float)
DEFINE_FOR(c10::BFloat16)
DEFINE_FOR(c10::Half)
DEFINE_FOR(c10::Float8_e4m3fn)
DEFINE_FOR(c10::Float8_e5m2)
#undef DEFINE_FOR

CLONE_FOR_WIDER_VECTORS
void project_tile(
    const float* vectors, int64_t num_vectors, const float* keys, int64_t key_stride, int64_t head_size, float* out) {
  int64_t done = 0;
  for (; done + kVectorsAtOnce <= num_vectors; done += kVectorsAtOnce) {
    project_some<kVectorsAtOnce>(vectors + done * head_size, keys, key_stride, head_size, out + done * kTile);
  }
  for (; done < num_vectors; ++done) {
    project_some<1>(vectors + done * head_size, keys, key_stride, head_size, out + done * kTile);
  }
}

CLONE_FOR_WIDER_VECTORS
float exponentiate_all(float* logits, int64_t count, float sink) {
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
  Floats sums = {}, part = {};  // whole ones first: a copy of a size that is not known is a call
  for (int64_t first = 0; first < whole; first += kLanes) {
    load(logits + first, part);
    part -= highest;
    exponentiate(part);
    store(part, logits + first);
    sums += part;
  }
  const int64_t rest = (count - whole) * sizeof(float);
  std::memcpy(&part, logits + whole, rest);
  part -= highest;
  exponentiate(part);
  std::memcpy(logits + whole, &part, rest);
  float sum = std::exp(sink - highest);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += sums[lane];
  }
  for (int64_t index = whole; index < count; ++index) {
    sum += logits[index];
  }
  return sum;
}

void soften(float* logits, int64_t count, float cap) {
  for (int64_t index = 0; index < count; ++index) {
    logits[index] = cap * std::tanh(logits[index] / cap);
  }
}

}  // namespace vllm_qfilters
