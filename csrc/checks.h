// What operators on sequences in a paged cache check alike.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace vllm_qfilters {

inline void check_pages(const at::Tensor& pages, int64_t num_blocks) {
  TORCH_CHECK(
      pages.dim() == 1 && pages.is_contiguous() && pages.scalar_type() == at::kLong,
      "pages must be contiguous int64, found ", pages.scalar_type(), pages.sizes());
  const int64_t* page = pages.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(
      std::all_of(page, page + pages.size(0), [&](int64_t number) { return 0 <= number && number < num_blocks; }),
      "a page lies beyond the ", num_blocks, " there are");
}

inline void check_page_table(const at::Tensor& page_table, int64_t num_blocks, int64_t block_size, int64_t num_tokens) {
  check_pages(page_table, num_blocks);
  TORCH_CHECK(
      page_table.size(0) * block_size >= num_tokens, "the page table must have pages of ", block_size, " for ",
      num_tokens, " tokens, found ", page_table.size(0));
}

// Where the elements of keys, or of values, lie in the pages of one head; or the first elements of each key, whose
// offsets lie in a row of those of the whole key.
inline void check_offsets(const at::Tensor& offsets, int64_t block_size, int64_t page_elements) {
  TORCH_CHECK(
      offsets.dim() == 2 && offsets.stride(1) == 1 && offsets.size(1) <= offsets.stride(0) &&
          offsets.scalar_type() == at::kLong && offsets.size(0) == block_size,
      "offsets must be int64 for ", block_size, " slots, those of a slot side by side, found ", offsets.scalar_type(),
      offsets.sizes(), " with strides ", offsets.strides());
  const int64_t whole = block_size * offsets.stride(0);
  TORCH_CHECK(
      2 * whole == page_elements || whole == page_elements, "offsets must be those of half of the ", page_elements,
      " elements of a page, or of all where keys stand alone, found ", offsets.sizes(), " with strides ",
      offsets.strides());
}

}  // namespace vllm_qfilters
