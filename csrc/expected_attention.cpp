#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "lanes.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

constexpr int64_t kTile = 4 * kLanes;  // tokens whose keys are gathered at once
constexpr int64_t kVectorsAtOnce = 4;  // with kTile tokens they fill the registers of AVX-512

// out[vector, token] = <vectors[vector], keys[token]>; keys are stored dimension by dimension, kTile tokens each.
CLONE_FOR_WIDER_VECTORS
void project_tile(const float* vectors, int64_t num_vectors, const float* keys, int64_t head_size, float* out) {
  for (int64_t first = 0; first < num_vectors; first += kVectorsAtOnce) {
    const int64_t count = std::min(kVectorsAtOnce, num_vectors - first);
    Floats sums[kVectorsAtOnce][kTile / kLanes] = {};
    for (int64_t dim = 0; dim < head_size; ++dim) {
      Floats key[kTile / kLanes];
      for (int64_t part = 0; part < kTile / kLanes; ++part) {
        load(keys + dim * kTile + part * kLanes, key[part]);
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

// Keys of tokens [first, first + count) of one head, dimension by dimension; the rest of the tile is left as it is.
template <typename Element>
void gather_tile(
    const Element* head_pages, int64_t page_stride, const int64_t* page_table, const at::Tensor& offsets, int64_t first,
    int64_t count, float* keys) {
  const int64_t block_size = offsets.size(0), head_size = offsets.size(1);
  for (int64_t index = 0; index < count; ++index) {
    const int64_t token = first + index;
    const Element* page = head_pages + page_table[token / block_size] * page_stride;
    const int64_t* offset = offsets.const_data_ptr<int64_t>() + token % block_size * head_size;
    for (int64_t dim = 0; dim < head_size; ++dim) {
      keys[dim * kTile + index] = static_cast<float>(page[offset[dim]]);
    }
  }
}

// Adds softmax(logits) * share to the row.
void add_softmax(std::vector<float>& logits, float share, float* row) {
  const float highest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float& logit : logits) {
    logit = std::exp(logit - highest);
    sum += logit;
  }
  for (size_t token = 0; token < logits.size(); ++token) {
    row[token] += static_cast<float>(logits[token] / sum * share);
  }
}

template <typename Element>
void expected_attention_of(
    const at::Tensor& pages, const at::Tensor& key_offsets, const at::Tensor& page_table, const at::Tensor& means,
    const at::Tensor& factors, at::Tensor& attention) {
  const int64_t num_kv_heads = pages.size(2), num_tokens = attention.size(2), head_size = means.size(2);
  const int64_t group = means.size(1) / num_kv_heads, rank = factors.size(2);
  const Element* first_page = static_cast<const Element*>(pages.const_data_ptr());
  const int64_t* table = page_table.const_data_ptr<int64_t>();
  const float* first_mean = means.const_data_ptr<float>();
  const float* first_factor = factors.const_data_ptr<float>();
  float* first_row = attention.mutable_data_ptr<float>();
  at::parallel_for(0, pages.size(0) * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    const int64_t num_vectors = group * (1 + rank);
    std::vector<float> vectors(num_vectors * head_size), keys(head_size * kTile, 0.0f), projections(num_vectors * kTile);
    std::vector<std::vector<float>> logits(group, std::vector<float>(num_tokens));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t layer = index / num_kv_heads, head = index % num_kv_heads;
      for (int64_t member = 0; member < group; ++member) {
        const int64_t query_head = (layer * num_kv_heads + head) * group + member;
        float* own = vectors.data() + member * (1 + rank) * head_size;
        std::copy_n(first_mean + query_head * head_size, head_size, own);
        std::copy_n(first_factor + query_head * rank * head_size, rank * head_size, own + head_size);
      }
      const Element* head_pages = first_page + layer * pages.stride(0) + head * pages.stride(2);
      for (int64_t first = 0; first < num_tokens; first += kTile) {
        const int64_t count = std::min(kTile, num_tokens - first);
        gather_tile(head_pages, pages.stride(1), table, key_offsets, first, count, keys.data());
        project_tile(vectors.data(), num_vectors, keys.data(), head_size, projections.data());
        for (int64_t member = 0; member < group; ++member) {
          const float* own = projections.data() + member * (1 + rank) * kTile;
          for (int64_t token = 0; token < count; ++token) {
            float variance = 0;
            for (int64_t direction = 1; direction <= rank; ++direction) {
              variance += own[direction * kTile + token] * own[direction * kTile + token];
            }
            logits[member][first + token] = own[token] + variance / 2;
          }
        }
      }
      float* row = first_row + index * num_tokens;
      for (int64_t member = 0; member < group; ++member) {
        add_softmax(logits[member], 1.0f / static_cast<float>(group), row);
      }
    }
  });
}

}  // namespace

at::Tensor expected_attention(
    const at::Tensor& pages, const at::Tensor& key_offsets, const at::Tensor& page_table, int64_t num_tokens,
    const at::Tensor& means, const at::Tensor& factors) {
  TORCH_CHECK(
      pages.dim() == 4 && means.dim() == 3 && factors.dim() == 4, "pages have 4 dimensions, means 3, factors 4, found ",
      pages.dim(), ", ", means.dim(), ", ", factors.dim());
  TORCH_CHECK(pages.stride(3) == 1, "the elements of a page must lie side by side");
  TORCH_CHECK(num_tokens > 0, "no attention can be expected for ", num_tokens, " tokens");
  check_offsets(key_offsets, key_offsets.size(0), pages.size(3));
  const int64_t num_kv_heads = pages.size(2), head_size = key_offsets.size(1);
  check_page_table(page_table, pages.size(1), key_offsets.size(0), num_tokens);
  for (const at::Tensor& statistics : {means, factors}) {
    TORCH_CHECK(
        statistics.is_contiguous() && statistics.scalar_type() == at::kFloat && statistics.size(0) == pages.size(0) &&
            statistics.size(1) == means.size(1) && statistics.size(-1) == head_size && means.size(1) % num_kv_heads == 0,
        "means and factors must be contiguous and float32 for query heads in groups of the ", num_kv_heads,
        " KV heads, found ", statistics.scalar_type(), statistics.sizes());
  }
  at::Tensor attention = at::zeros({pages.size(0), num_kv_heads, num_tokens}, means.options());
  switch (pages.scalar_type()) {
    case at::kFloat:
      expected_attention_of<float>(pages, key_offsets, page_table, means, factors, attention);
      break;
    case at::kBFloat16:
      expected_attention_of<c10::BFloat16>(pages, key_offsets, page_table, means, factors, attention);
      break;
    case at::kHalf:
      expected_attention_of<c10::Half>(pages, key_offsets, page_table, means, factors, attention);
      break;
    default:
      TORCH_CHECK(false, "pages must be float32, bfloat16 or float16, found ", pages.scalar_type());
  }
  return attention;
}

}  // namespace vllm_qfilters
