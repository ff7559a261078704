#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "key_tiles.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

constexpr float kSmallestNorm = 1e-12f;

// Halves are added while they are vectors: lane by lane takes as long as the products.
ALWAYS_INLINE float sum_of_lanes(const Floats& floats) {
  typedef float Half __attribute__((vector_size(sizeof(Floats) / 2)));
  typedef float Quarter __attribute__((vector_size(sizeof(Floats) / 4)));
  Half halves[2];
  std::memcpy(halves, &floats, sizeof(floats));
  halves[0] += halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, halves, sizeof(quarters));
  quarters[0] += quarters[1];
  return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

ALWAYS_INLINE float dot(const float* one, const float* other, int64_t padded_size) {
  Floats sums{}, a, b;
  for (int64_t dim = 0; dim < padded_size; dim += kLanes) {
    load(one + dim, a);
    load(other + dim, b);
    sums += a * b;
  }
  return sum_of_lanes(sums);
}

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

// The keys or values of all layers and heads of a sequence.
//
// pages: [num_layers, num_blocks, num_kv_heads, block_size * (head_size + value_size)]
// offsets: [block_size, size] int64, where their elements lie in the pages of a head
// page_table: [num_pages] int64
template <typename Element>
class PagedRows {
 public:
  PagedRows(const at::Tensor& pages, const at::Tensor& offsets, const at::Tensor& page_table)
      : pages_(pages), places_(places_of<Element>(offsets)), page_table_(page_table.const_data_ptr<int64_t>()) {}

  // Elements of a row, those that are 0 behind its end among them.
  int64_t padded_size() const {
    return (places_.row_size + kLanes - 1) / kLanes * kLanes;
  }

  // Calls see(first, count, rows) for page after page of the tokens of one head.
  template <typename See>
  void visit(int64_t layer, int64_t head, int64_t num_tokens, See see) const {
    const int64_t block_size = places_.num_rows, stride = padded_size();
    std::vector<Line> lines((block_size + 1) * stride / kLanes);
    float* rows = lines.data()->floats;
    const Element* head_pages =
        static_cast<const Element*>(pages_.const_data_ptr()) + layer * pages_.stride(0) + head * pages_.stride(2);
    for (int64_t first = 0; first < num_tokens; first += block_size) {
      const int64_t count = std::min(block_size, num_tokens - first);
      const Element* page = head_pages + page_table_[first / block_size] * pages_.stride(1);
      gather_rows(page, places_, count, 0, places_.row_size, rows, stride);
      see(first, count, static_cast<const float*>(rows));
    }
  }

 private:
  const at::Tensor& pages_;
  const RowPlaces places_;
  const int64_t* page_table_;
};

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
