#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

constexpr int64_t kScoresPerThread = 1 << 12;
constexpr double kSmallestDeviation = 1e-12;

// Orders like the scores, then by index; NaN is highest, as for topk. The order is total, as nth_element must not see
// NaN compared.
uint64_t rank(float score, int64_t index) {
  const uint32_t bits = c10::bit_cast<uint32_t>(score);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  const uint64_t high = std::isnan(score) ? std::numeric_limits<uint32_t>::max() : ordered;
  return high << 32 | static_cast<uint64_t>(index);
}

// Marks the `count` highest of `num_candidates` scores.
void mark_highest(
    const float* scores, int64_t num_candidates, int64_t count, bool* is_kept, std::vector<uint64_t>& ranks) {
  if (count <= 0) {
    return;
  }
  ranks.resize(num_candidates);
  for (int64_t index = 0; index < num_candidates; ++index) {
    ranks[index] = rank(scores[index], index);
  }
  std::nth_element(ranks.begin(), ranks.begin() + (count - 1), ranks.end(), std::greater<>());
  for (int64_t place = 0; place < count; ++place) {
    is_kept[ranks[place] & std::numeric_limits<uint32_t>::max()] = true;
  }
}

// mean_scores += (scores - mean) / deviation / num_kv_heads
CLONE_FOR_WIDER_VECTORS
void add_z_scores(
    const float* scores, int64_t count, double mean, double deviation, int64_t num_kv_heads, float* mean_scores) {
  for (int64_t token = 0; token < count; ++token) {
    mean_scores[token] += static_cast<float>((scores[token] - mean) / deviation / static_cast<double>(num_kv_heads));
  }
}

// Adds one head's share to the mean over heads of scores, standardised by those between sinks and window.
void add_standardised(
    const float* scores, int64_t resident, int64_t sinks, int64_t window, int64_t num_kv_heads, float* mean_scores) {
  const int64_t end = resident - window, num_candidates = end - sinks;
  double sum = 0, sum_of_squares = 0;
  for (int64_t token = sinks; token < end; ++token) {
    sum += scores[token];
  }
  const double mean = sum / num_candidates;
  for (int64_t token = sinks; token < end; ++token) {
    sum_of_squares += (scores[token] - mean) * (scores[token] - mean);
  }
  const double deviation = std::max(std::sqrt(sum_of_squares / num_candidates), kSmallestDeviation);
  add_z_scores(scores, resident, mean, deviation, num_kv_heads, mean_scores);
}

void check_scores(const at::Tensor& scores, int64_t sinks, int64_t window) {
  TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == at::kFloat, "scores must be float32 with 3 dimensions");
  TORCH_CHECK(
      sinks >= 0 && window >= 0 && sinks + window <= scores.size(2), sinks, " sinks and a window of ", window,
      " do not fit into ", scores.size(2), " tokens");
}

}  // namespace

at::Tensor mean_standardised(const at::Tensor& scores, int64_t sinks, int64_t window) {
  check_scores(scores, sinks, window);
  const int64_t num_layers = scores.size(0), num_kv_heads = scores.size(1), resident = scores.size(2);
  const at::Tensor rows = scores.stride(2) == 1 ? scores : scores.contiguous();
  at::Tensor shared = at::zeros({num_layers, 1, resident}, scores.options());
  const float* first_score = rows.const_data_ptr<float>();
  float* first_shared = shared.mutable_data_ptr<float>();
  const int64_t grain = kScoresPerThread / std::max<int64_t>(1, resident * num_kv_heads) + 1;
  at::parallel_for(0, num_layers, grain, [&](int64_t begin, int64_t end) {
    for (int64_t layer = begin; layer < end; ++layer) {
      for (int64_t head = 0; head < num_kv_heads; ++head) {
        const float* own = first_score + layer * rows.stride(0) + head * rows.stride(1);
        add_standardised(own, resident, sinks, window, num_kv_heads, first_shared + layer * resident);
      }
    }
  });
  return shared;
}

at::Tensor select_kept(const at::Tensor& scores, int64_t kept, int64_t sinks, int64_t window) {
  TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == at::kFloat, "scores must be float32 with 3 dimensions");
  const int64_t num_layers = scores.size(0), num_heads = scores.size(1), resident = scores.size(2);
  const int64_t num_candidates = resident - sinks - window, count = kept - sinks - window;
  TORCH_CHECK(
      sinks >= 0 && window >= 0 && num_candidates >= 0 && count <= num_candidates, "cannot keep ", kept, " of ",
      resident, " tokens with ", sinks, " sinks and a window of ", window);
  const at::Tensor rows = scores.stride(2) == 1 ? scores : scores.contiguous();
  at::Tensor is_kept = at::ones(scores.sizes(), scores.options().dtype(at::kBool));
  const float* first_score = rows.const_data_ptr<float>() + sinks;
  bool* first_flag = is_kept.mutable_data_ptr<bool>() + sinks;
  const int64_t grain = kScoresPerThread / std::max<int64_t>(1, num_candidates) + 1;
  at::parallel_for(0, num_layers * num_heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> ranks;
    for (int64_t index = begin; index < end; ++index) {
      const float* own = first_score + index / num_heads * rows.stride(0) + index % num_heads * rows.stride(1);
      bool* flags = first_flag + index * resident;
      std::fill_n(flags, num_candidates, false);
      mark_highest(own, num_candidates, count, flags, ranks);
    }
  });
  return is_kept;
}

}  // namespace vllm_qfilters
