#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

#include "checks.h"
#include "lanes.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

constexpr int64_t kScoresPerThread = 1 << 14;

// The sum of the scores less the mean, each: the difference of two large sums would be inexact.
CLONE_FOR_WIDER_VECTORS
double sum_of_deviations(const float* scores, int64_t count, float mean) {
  Floats sums = {}, lanes;
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    load(scores + index, lanes);
    sums += lanes - mean;
  }
  const float* parts = reinterpret_cast<const float*>(&sums);
  double sum = std::accumulate(parts, parts + kLanes, 0.0);
  for (; index < count; ++index) {
    sum += scores[index] - mean;
  }
  return sum;
}

void check_statistics(const at::Tensor& statistics, const at::Tensor& score_plane) {
  TORCH_CHECK(
      statistics.dim() == 2 && statistics.is_contiguous() && statistics.scalar_type() == at::kFloat &&
          statistics.size(0) == score_plane.size(0) && statistics.size(1) == score_plane.size(2),
      "means and deviations must be contiguous and float32 for ", score_plane.size(0), " layers of ",
      score_plane.size(2), " heads, found ", statistics.scalar_type(), statistics.sizes());
}

}  // namespace

at::Tensor page_scores(
    const at::Tensor& score_plane, const at::Tensor& pages, const at::Tensor& mean, const at::Tensor& deviation) {
  TORCH_CHECK(
      score_plane.dim() == 4 && score_plane.stride(3) == 1 && score_plane.scalar_type() == at::kFloat,
      "scores must be float32 with 4 dimensions, those of a page and head side by side, found ",
      score_plane.scalar_type(), score_plane.sizes());
  check_pages(pages, score_plane.size(1));
  check_statistics(mean, score_plane);
  check_statistics(deviation, score_plane);
  const int64_t num_layers = score_plane.size(0), num_kv_heads = score_plane.size(2), block_size = score_plane.size(3);
  const int64_t num_scores = num_layers * num_kv_heads * block_size;
  at::Tensor found = at::empty(pages.sizes(), score_plane.options());
  const int64_t* page = pages.const_data_ptr<int64_t>();
  const float* first = score_plane.const_data_ptr<float>();
  const float* means = mean.const_data_ptr<float>();
  const float* deviations = deviation.const_data_ptr<float>();
  float* score = found.mutable_data_ptr<float>();
  const int64_t grain = kScoresPerThread / std::max<int64_t>(1, num_scores) + 1;
  at::parallel_for(0, pages.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      double total = 0;
      for (int64_t layer = 0; layer < num_layers; ++layer) {
        const float* scores = first + layer * score_plane.stride(0) + page[index] * score_plane.stride(1);
        for (int64_t head = 0; head < num_kv_heads; ++head) {
          const int64_t at = layer * num_kv_heads + head;
          total += sum_of_deviations(scores + head * score_plane.stride(2), block_size, means[at]) / deviations[at];
        }
      }
      score[index] = static_cast<float>(total / static_cast<double>(num_scores));
    }
  });
  return found;
}

}  // namespace vllm_qfilters
