#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "key_tiles.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

// The logarithm of the expectation of e^g(x) for normally distributed x and a soft cap g.
float capped_logit(float mean, float variance, float cap) {
  const float capped = std::tanh((mean + variance / 2) / cap);
  const float slope = 1 - capped * capped;
  return cap * std::tanh((mean + variance * slope) / cap) - variance * slope * slope / 2;
}

// logits[token] becomes the expected logit of a token, of its products with a mean and with `rank` factors behind it.
CLONE_WITHOUT_FMA
void expect_logits(const float* products, int64_t rank, int64_t count, float cap, float* logits) {
  float variances[kTile] = {};
  for (int64_t direction = 1; direction <= rank; ++direction) {
    const float* own = products + direction * kTile;
    for (int64_t token = 0; token < kTile; ++token) {
      variances[token] += own[token] * own[token];
    }
  }
  if (cap == 0) {
    for (int64_t token = 0; token < count; ++token) {
      logits[token] = products[token] + variances[token] / 2;
    }
  } else {
    for (int64_t token = 0; token < count; ++token) {
      logits[token] = capped_logit(products[token], variances[token], cap);
    }
  }
}

// mean += weights / total / divisor
CLONE_FOR_WIDER_VECTORS
void add_share(const float* weights, int64_t count, float total, float divisor, float* mean) {
  for (int64_t index = 0; index < count; ++index) {
    mean[index] += weights[index] / total / divisor;
  }
}

template <typename Element>
void expected_attention_of(
    const PagedKeys<Element>& keys, const at::Tensor& means, const at::Tensor& factors, const Softmax& softmax,
    at::Tensor& attention) {
  const int64_t num_kv_heads = attention.size(1), num_tokens = attention.size(2), head_size = means.size(2);
  const int64_t padded_group = means.size(1) / num_kv_heads, rank = factors.size(2);
  const float* first_mean = means.const_data_ptr<float>();
  const float* first_factor = factors.const_data_ptr<float>();
  float* first_row = attention.mutable_data_ptr<float>();
  at::parallel_for(0, attention.size(0) * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> vectors(padded_group * (1 + rank) * head_size), logits(padded_group * num_tokens);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t layer = index / num_kv_heads, kv_head = index % num_kv_heads;
      const int64_t group = softmax.group_size(layer);
      for (int64_t member = 0; member < group; ++member) {
        const int64_t query_head = index * padded_group + member;
        float* own = vectors.data() + member * (1 + rank) * head_size;
        std::copy_n(first_mean + query_head * head_size, head_size, own);
        std::copy_n(first_factor + query_head * rank * head_size, rank * head_size, own + head_size);
      }
      auto add_variance = [&](int64_t first, int64_t count, const float* products) {
        for (int64_t member = 0; member < group; ++member) {
          const float* own = products + member * (1 + rank) * kTile;
          expect_logits(own, rank, count, softmax.soft_cap(), logits.data() + member * num_tokens + first);
        }
      };
      keys.project(layer, kv_head, num_tokens, vectors.data(), group * (1 + rank), add_variance);
      float* row = first_row + index * num_tokens;
      for (int64_t member = 0; member < group; ++member) {
        float* own = logits.data() + member * num_tokens;
        const float total = softmax(own, num_tokens, layer, kv_head, member);
        add_share(own, num_tokens, total, static_cast<float>(group), row);
      }
    }
  });
}

}  // namespace

at::Tensor expected_attention(
    const at::Tensor& pages, const at::Tensor& key_offsets, const at::Tensor& page_table, int64_t num_tokens,
    const at::Tensor& means, const at::Tensor& factors, const std::optional<at::Tensor>& group_sizes,
    const std::optional<at::Tensor>& sinks, double soft_cap) {
  check_paged_keys(pages, key_offsets, page_table, num_tokens);
  TORCH_CHECK(
      means.dim() == 3 && factors.dim() == 4 && means.size(1) == factors.size(1),
      "means have 3 dimensions and factors of as many heads 4, found ", means.sizes(), " and ", factors.sizes());
  check_queries(means, "means", pages, key_offsets.size(1));
  check_queries(factors, "factors", pages, key_offsets.size(1));
  const Softmax softmax(group_sizes, sinks, soft_cap, pages.size(0), means.size(1), pages.size(2));
  at::Tensor attention = at::zeros({pages.size(0), pages.size(2), num_tokens}, means.options());
  with_paged_keys(pages, key_offsets, page_table, [&](const auto& keys) {
    expected_attention_of(keys, means, factors, softmax, attention);
  });
  return attention;
}

}  // namespace vllm_qfilters
