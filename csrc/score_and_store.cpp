#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "lanes.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

// Below this many multiplications per thread, waking one costs more than it saves: a decode step stays on its thread.
constexpr int64_t kMultiplicationsPerThread = 1 << 16;

// As a tree, whose additions do not wait for each other.
template <int64_t count>
ALWAYS_INLINE float sum_of(const float* floats) {
  if constexpr (count == 1) {
    return floats[0];
  } else {
    float pairs[count / 2];
    for (int64_t index = 0; index < count / 2; ++index) {
      pairs[index] = floats[index] + floats[index + count / 2];
    }
    return sum_of<count / 2>(pairs);
  }
}

template <typename Element>
ALWAYS_INLINE float dot(const Element* elements, const float* filter, int64_t head_size) {
  Floats sums = {}, element_lanes, filter_lanes;
  int64_t dim = 0;
  for (; dim + kLanes <= head_size; dim += kLanes) {
    load(elements + dim, element_lanes);
    load(filter + dim, filter_lanes);
    sums += element_lanes * filter_lanes;
  }
  float sum = sum_of<kLanes>(reinterpret_cast<const float*>(&sums));
  for (; dim < head_size; ++dim) {
    sum += static_cast<float>(elements[dim]) * filter[dim];
  }
  return sum;
}

struct Sizes {
  int64_t num_kv_heads;
  int64_t head_size;
  int64_t head_stride;    // of the elements
  int64_t number_stride;  // from head to head in a plane
};

// What is left beside a token, for every head. One clone per type: only whole functions can be cloned for wide vectors.
#define DEFINE_FOR(Element)                                                                          \
  CLONE_FOR_WIDER_VECTORS                                                                            \
  void project_token(const Element* key, const float* filters, float* numbers, const Sizes& sizes) { \
    for (int64_t head = 0; head < sizes.num_kv_heads; ++head) {                                      \
      numbers[head * sizes.number_stride] =                                                          \
          dot(key + head * sizes.head_stride, filters + head * sizes.head_size, sizes.head_size);    \
    }                                                                                                \
  }
DEFINE_FOR(float)
DEFINE_FOR(c10::BFloat16)
DEFINE_FOR(c10::Half)
#undef DEFINE_FOR

template <typename Element>
void score_tokens(
    const at::Tensor& key, const at::Tensor& filters, at::Tensor& score_plane, const at::Tensor& slot_mapping) {
  const Sizes sizes{key.size(1), key.size(2), key.stride(1), score_plane.stride(1)};
  const int64_t num_blocks = score_plane.size(0), block_size = score_plane.size(2);
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  const Element* keys = key.const_data_ptr<Element>();
  const float* filter = filters.const_data_ptr<float>();
  float* plane = score_plane.mutable_data_ptr<float>();
  const int64_t grain = kMultiplicationsPerThread / std::max<int64_t>(1, sizes.num_kv_heads * sizes.head_size) + 1;
  at::parallel_for(0, slot_mapping.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (slots[token] < 0) {
        continue;  // padding
      }
      const int64_t block = slots[token] / block_size, slot = slots[token] % block_size;
      TORCH_CHECK_INDEX(
          block < num_blocks, "slot ", slots[token], " lies beyond the ", num_blocks, " blocks of ", block_size);
      float* numbers = plane + block * score_plane.stride(0) + slot * score_plane.stride(2);
      project_token(keys + token * key.stride(0), filter, numbers, sizes);
    }
  });
}

}  // namespace

void score_and_store(
    const at::Tensor& key, const at::Tensor& filters, at::Tensor& score_plane, const at::Tensor& slot_mapping) {
  TORCH_CHECK(
      key.dim() == 3 && slot_mapping.dim() == 1 && score_plane.dim() == 3,
      "keys and scores have 3 dimensions, slots 1, found ", key.dim(), ", ", score_plane.dim(), ", ",
      slot_mapping.dim());
  TORCH_CHECK(
      slot_mapping.size(0) <= key.size(0) && slot_mapping.is_contiguous() && slot_mapping.scalar_type() == at::kLong,
      "slots must be contiguous, int64 and at most ", key.size(0), ", found ", slot_mapping.scalar_type(),
      slot_mapping.sizes());
  TORCH_CHECK(key.stride(2) == 1, "the elements of a key must lie side by side, found stride ", key.stride(2));
  TORCH_CHECK(
      filters.sizes() == key.sizes().slice(1) && filters.is_contiguous() && filters.scalar_type() == at::kFloat,
      "filters must be contiguous, float32 and of shape ", key.sizes().slice(1), ", found ", filters.scalar_type(),
      filters.sizes());
  TORCH_CHECK(
      score_plane.size(1) == key.size(1) && score_plane.scalar_type() == at::kFloat, "scores must be float32 for ",
      key.size(1), " heads, found ", score_plane.scalar_type(), score_plane.sizes());
  switch (key.scalar_type()) {
    case at::kFloat:
      return score_tokens<float>(key, filters, score_plane, slot_mapping);
    case at::kBFloat16:
      return score_tokens<c10::BFloat16>(key, filters, score_plane, slot_mapping);
    case at::kHalf:
      return score_tokens<c10::Half>(key, filters, score_plane, slot_mapping);
    default:
      TORCH_CHECK(false, "keys must be float32, bfloat16 or float16, found ", key.scalar_type());
  }
}

}  // namespace vllm_qfilters
