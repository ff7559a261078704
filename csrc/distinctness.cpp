#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "operators.h"
#include "paged_rows.h"

namespace vllm_qfilters {
namespace {

constexpr float kSmallestNorm = 1e-12f;

float inverse_norm(float squares) {
  return 1 / std::max(std::sqrt(squares), kSmallestNorm);
}

// inverse_norms[index] becomes 1 / |rows[index]|, and anchor grows by the rows divided by their norms.
CLONE_FOR_WIDER_VECTORS
void add_directions(const float* rows, int64_t padded_size, int64_t count, float* inverse_norms, float* anchor) {
  for (int64_t index = 0; index < count; ++index) {
    const float* row = rows + index * padded_size;
    const float inverse = inverse_norm(dot(row, row, padded_size));
    inverse_norms[index] = inverse;
    for (int64_t dim = 0; dim < padded_size; dim += kLanes) {
      Floats part, sums;
      load(row + dim, part);
      load(anchor + dim, sums);
      store(sums + part * inverse, anchor + dim);
    }
  }
}

// own[index] becomes minus the cosine of rows[index] and an anchor of norm 1.
CLONE_FOR_WIDER_VECTORS
void turn_away(
    const float* rows, int64_t padded_size, int64_t count, const float* inverse_norms, const float* anchor,
    float* own) {
  for (int64_t index = 0; index < count; ++index) {
    own[index] = -dot(rows + index * padded_size, anchor, padded_size) * inverse_norms[index];
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
void distinctness_of(const PagedRows<Element>& paged, int64_t pool, at::Tensor& distinctness) {
  const int64_t num_kv_heads = distinctness.size(1), num_tokens = distinctness.size(2), size = paged.padded_size();
  float* first_row = distinctness.mutable_data_ptr<float>();
  at::parallel_for(0, distinctness.size(0) * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> inverse_norms(num_tokens), anchor(size), own(num_tokens);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t layer = index / num_kv_heads, head = index % num_kv_heads;
      std::fill(anchor.begin(), anchor.end(), 0.0f);
      paged.visit(layer, head, num_tokens, [&](int64_t first, int64_t count, const float* rows) {
        add_directions(rows, size, count, inverse_norms.data() + first, anchor.data());
      });
      float squares = 0;
      for (const float value : anchor) {
        squares += value * value;
      }
      const float inverse = inverse_norm(squares);
      for (float& value : anchor) {
        value *= inverse;
      }
      paged.visit(layer, head, num_tokens, [&](int64_t first, int64_t count, const float* rows) {
        turn_away(rows, size, count, inverse_norms.data() + first, anchor.data(), own.data() + first);
      });
      average_neighbours(own.data(), num_tokens, pool, first_row + index * num_tokens);
    }
  });
}

}  // namespace

at::Tensor distinctness(
    const at::Tensor& pages, const at::Tensor& offsets, const at::Tensor& page_table, int64_t num_tokens,
    int64_t pool) {
  check_paged_keys(pages, offsets, page_table, num_tokens);
  TORCH_CHECK(pool > 0 && pool % 2 == 1, "a token is in the middle of an odd number of neighbours, found ", pool);
  at::Tensor found = at::empty({pages.size(0), pages.size(2), num_tokens}, at::kFloat);
  with_element_of(pages, [&](auto element) {
    distinctness_of(PagedRows<decltype(element)>(pages, offsets, page_table), pool, found);
  });
  return found;
}

}  // namespace vllm_qfilters
