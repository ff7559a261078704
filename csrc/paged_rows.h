// Keys or values of a sequence, gathered from its pages row by row, and their products.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "key_tiles.h"

namespace vllm_qfilters {

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

// The keys or values of all layers and heads of a sequence.
//
// pages: [num_layers, num_blocks, num_kv_heads, block_size * (head_size + value_size)]
// offsets: [block_size, size] int64, where their elements lie in the pages of a head; rows may lie apart
// page_table: [num_pages] int64
template <typename Element>
class PagedRows {
 public:
  PagedRows(const at::Tensor& pages, const at::Tensor& offsets, const at::Tensor& page_table)
      : pages_(pages),
        offsets_(offsets.contiguous()),
        places_(places_of<Element>(offsets_)),
        page_table_(page_table.const_data_ptr<int64_t>()) {}

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
  const at::Tensor offsets_;
  const RowPlaces places_;
  const int64_t* page_table_;
};

}  // namespace vllm_qfilters
