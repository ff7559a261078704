#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "key_tiles.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

constexpr float kSmallestNorm = 1e-12f;

// From the sum of squares.
float inverse_norm(float squares) {
  return 1 / std::max(std::sqrt(squares), kSmallestNorm);
}

// inverse_norms[token] becomes 1 / |keys[token]|; keys are stored dimension by dimension, key_stride tokens each.
CLONE_FOR_WIDER_VECTORS
void invert_norms(const float* keys, int64_t key_stride, int64_t head_size, int64_t count, float* inverse_norms) {
  std::fill_n(inverse_norms, count, 0.0f);
  for (int64_t dim = 0; dim < head_size; ++dim) {
    const float* row = keys + dim * key_stride;
    for (int64_t token = 0; token < count; ++token) {
      inverse_norms[token] += row[token] * row[token];
    }
  }
  for (int64_t token = 0; token < count; ++token) {
    inverse_norms[token] = inverse_norm(inverse_norms[token]);
  }
}

// total[dim] grows by the sum over tokens of keys[dim, token] * factors[token].
CLONE_FOR_WIDER_VECTORS
void add_products(
    const float* keys, int64_t key_stride, int64_t head_size, int64_t count, const float* factors, float* total) {
  for (int64_t dim = 0; dim < head_size; ++dim) {
    const float* row = keys + dim * key_stride;
    Floats sums{}, key, factor;
    int64_t token = 0;
    for (; token + kLanes <= count; token += kLanes) {
      load(row + token, key);
      load(factors + token, factor);
      sums += key * factor;
    }
    for (; token < count; ++token) {
      sums[0] += row[token] * factors[token];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      total[dim] += sums[lane];
    }
  }
}

// means[index] becomes the mean of the `pool` values around values[index], of those that are there; pool is odd.
CLONE_FOR_WIDER_VECTORS
void average_neighbours(const float* values, int64_t count, int64_t pool, float* means) {
  std::fill_n(means, count, 0.0f);
  for (int64_t step = -(pool / 2); step <= pool / 2; ++step) {
    for (int64_t index = std::max<int64_t>(0, -step); index < std::min(count, count - step); ++index) {
      means[index] += values[index + step];
    }
  }
  for (int64_t index = 0; index < count; ++index) {
    const int64_t first = std::max<int64_t>(0, index - pool / 2), last = std::min(count - 1, index + pool / 2);
    means[index] /= static_cast<float>(last - first + 1);
  }
}

template <typename Element>
void key_distinctness_of(const PagedKeys<Element>& keys, int64_t head_size, int64_t pool, at::Tensor& distinctness) {
  const int64_t num_kv_heads = distinctness.size(1), num_tokens = distinctness.size(2);
  float* first_row = distinctness.mutable_data_ptr<float>();
  at::parallel_for(0, distinctness.size(0) * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> inverse_norms(num_tokens), anchor(head_size), own(num_tokens);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t layer = index / num_kv_heads, head = index % num_kv_heads;
      std::fill(anchor.begin(), anchor.end(), 0.0f);
      keys.visit(layer, head, num_tokens, [&](int64_t first, int64_t count, const float* gathered, int64_t key_stride) {
        invert_norms(gathered, key_stride, head_size, count, inverse_norms.data() + first);
        add_products(gathered, key_stride, head_size, count, inverse_norms.data() + first, anchor.data());
      });
      float squares = 0;
      for (const float value : anchor) {
        squares += value * value;
      }
      const float inverse = inverse_norm(squares);
      for (float& value : anchor) {
        value *= inverse;
      }
      keys.project(layer, head, num_tokens, anchor.data(), 1, [&](int64_t first, int64_t count, const float* products) {
        for (int64_t token = 0; token < count; ++token) {
          own[first + token] = -products[token] * inverse_norms[first + token];
        }
      });
      average_neighbours(own.data(), num_tokens, pool, first_row + index * num_tokens);
    }
  });
}

}  // namespace

at::Tensor key_distinctness(
    const at::Tensor& pages, const at::Tensor& key_offsets, const at::Tensor& page_table, int64_t num_tokens,
    int64_t pool) {
  check_paged_keys(pages, key_offsets, page_table, num_tokens);
  TORCH_CHECK(pool > 0 && pool % 2 == 1, "a token is in the middle of an odd number of neighbours, found ", pool);
  at::Tensor distinctness = at::empty({pages.size(0), pages.size(2), num_tokens}, at::kFloat);
  with_paged_keys(pages, key_offsets, page_table, [&](const auto& keys) {
    key_distinctness_of(keys, key_offsets.size(1), pool, distinctness);
  });
  return distinctness;
}

}  // namespace vllm_qfilters
