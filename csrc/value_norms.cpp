#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <cmath>

#include "operators.h"
#include "paged_rows.h"

namespace vllm_qfilters {
namespace {

// norms[index] becomes |rows[index]|.
CLONE_FOR_WIDER_VECTORS
void measure(const float* rows, int64_t padded_size, int64_t count, float* norms) {
  for (int64_t index = 0; index < count; ++index) {
    const float* row = rows + index * padded_size;
    norms[index] = std::sqrt(dot(row, row, padded_size));
  }
}

template <typename Element>
void norms_of(const PagedRows<Element>& paged, at::Tensor& norms) {
  const int64_t num_kv_heads = norms.size(1), num_tokens = norms.size(2), size = paged.padded_size();
  float* of_heads = norms.mutable_data_ptr<float>();
  at::parallel_for(0, norms.size(0) * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      float* of_head = of_heads + index * num_tokens;
      paged.visit(
          index / num_kv_heads, index % num_kv_heads, num_tokens,
          [&](int64_t first, int64_t count, const float* rows) { measure(rows, size, count, of_head + first); });
    }
  });
}

}  // namespace

at::Tensor value_norms(
    const at::Tensor& pages, const at::Tensor& offsets, const at::Tensor& page_table, int64_t num_tokens) {
  check_paged_keys(pages, offsets, page_table, num_tokens);
  at::Tensor norms = at::empty({pages.size(0), pages.size(2), num_tokens}, at::kFloat);
  with_element_of(
      pages, [&](auto element) { norms_of(PagedRows<decltype(element)>(pages, offsets, page_table), norms); });
  return norms;
}

}  // namespace vllm_qfilters
