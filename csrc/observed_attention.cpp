#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "key_tiles.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

// Of one thread at once, as many queries' as that allows: 8 MiB. The keys are gathered anew for the next ones.
constexpr int64_t kMostLogits = 2 << 20;

// sum += weights / total * share, and peak is the most of itself and weights / total.
CLONE_FOR_WIDER_VECTORS
void accumulate(const float* weights, int64_t count, float total, float share, float* sum, float* peak) {
  for (int64_t index = 0; index < count; ++index) {
    const float weight = weights[index] / total;
    sum[index] += weight * share;
    peak[index] = weight > peak[index] ? weight : peak[index];
  }
}

template <typename Element>
void observed_attention_of(
    const PagedKeys<Element>& keys, const at::Tensor& queries, const Softmax& softmax, at::Tensor& mean,
    at::Tensor& peak) {
  const int64_t num_kv_heads = mean.size(1), num_tokens = mean.size(2);
  const int64_t num_queries = queries.size(2), head_size = queries.size(3);
  const int64_t most_vectors = queries.size(1) / num_kv_heads * num_queries;
  const float* first_query = queries.const_data_ptr<float>();
  float* first_mean = mean.mutable_data_ptr<float>();
  float* first_peak = peak.mutable_data_ptr<float>();
  const int64_t at_once = std::clamp<int64_t>(kMostLogits / num_tokens, 1, most_vectors);
  at::parallel_for(0, mean.size(0) * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> logits(at_once * num_tokens);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t layer = index / num_kv_heads, kv_head = index % num_kv_heads;
      const int64_t num_vectors = softmax.group_size(layer) * num_queries;
      const float share = 1.0f / static_cast<float>(num_vectors);
      for (int64_t first_vector = 0; first_vector < num_vectors; first_vector += at_once) {
        const int64_t some = std::min(at_once, num_vectors - first_vector);
        auto keep = [&](int64_t first, int64_t count, const float* products) {
          for (int64_t vector = 0; vector < some; ++vector) {
            std::copy_n(products + vector * kTile, count, logits.data() + vector * num_tokens + first);
          }
        };
        const float* vectors = first_query + (index * most_vectors + first_vector) * head_size;
        keys.project(layer, kv_head, num_tokens, vectors, some, keep);
        for (int64_t vector = 0; vector < some; ++vector) {
          const int64_t member = (first_vector + vector) / num_queries, query = (first_vector + vector) % num_queries;
          const int64_t seen = num_tokens - num_queries + query + 1;  // no query sees the tokens after its own
          float* own = logits.data() + vector * num_tokens;
          if (softmax.soft_cap() != 0) {
            soften(own, seen, softmax.soft_cap());
          }
          const float total = softmax(own, seen, layer, kv_head, member);
          accumulate(own, seen, total, share, first_mean + index * num_tokens, first_peak + index * num_tokens);
        }
      }
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> observed_attention(
    const at::Tensor& pages, const at::Tensor& key_offsets, const at::Tensor& page_table, int64_t num_tokens,
    const at::Tensor& queries, const std::optional<at::Tensor>& group_sizes, const std::optional<at::Tensor>& sinks,
    double soft_cap) {
  check_paged_keys(pages, key_offsets, page_table, num_tokens);
  TORCH_CHECK(
      queries.dim() == 4 && queries.size(2) > 0 && queries.size(2) <= num_tokens,
      "queries have 4 dimensions, and are not more than the ", num_tokens, " tokens, found ", queries.sizes());
  check_queries(queries, "queries", pages, key_offsets.size(1));
  const Softmax softmax(group_sizes, sinks, soft_cap, pages.size(0), queries.size(1), pages.size(2));
  at::Tensor mean = at::zeros({pages.size(0), pages.size(2), num_tokens}, queries.options());
  at::Tensor peak = at::zeros_like(mean);
  with_paged_keys(pages, key_offsets, page_table, [&](const auto& keys) {
    observed_attention_of(keys, queries, softmax, mean, peak);
  });
  return {mean, peak};
}

}  // namespace vllm_qfilters
