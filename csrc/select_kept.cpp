#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "operators.h"

namespace vllm_qfilters {
namespace {

constexpr int64_t kScoresPerThread = 1 << 12;
constexpr double kSmallestDeviation = 1e-12;

// Orders like the scores, then by index; NaN is highest, as for topk. A total order: nth_element must not see NaN compared.
uint64_t rank(float score, int64_t index) {
  const uint32_t bits = c10::bit_cast<uint32_t>(score);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  const uint64_t high = std::isnan(score) ? std::numeric_limits<uint32_t>::max() : ordered;
  return high << 32 | static_cast<uint64_t>(index);
}

// Marks the `count` highest of `num_candidates` scores.
void mark_highest(const float* scores, int64_t num_candidates, int64_t count, bool* is_kept, std::vector<uint64_t>& ranks) {
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

// Adds one head's share to the mean over heads of standardised scores.
void add_standardised(const float* scores, int64_t num_candidates, int64_t num_kv_heads, std::vector<float>& mean_scores) {
  double sum = 0, sum_of_squares = 0;
  for (int64_t index = 0; index < num_candidates; ++index) {
    sum += scores[index];
  }
  const double mean = sum / num_candidates;
  for (int64_t index = 0; index < num_candidates; ++index) {
    sum_of_squares += (scores[index] - mean) * (scores[index] - mean);
  }
  const double deviation = std::max(std::sqrt(sum_of_squares / num_candidates), kSmallestDeviation);
  for (int64_t index = 0; index < num_candidates; ++index) {
    mean_scores[index] += static_cast<float>((scores[index] - mean) / deviation / num_kv_heads);
  }
}

}  // namespace

at::Tensor select_kept(const at::Tensor& scores, int64_t kept, int64_t sinks, int64_t window, bool shared_by_heads) {
  TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == at::kFloat, "scores must be float32 with 3 dimensions");
  const int64_t num_layers = scores.size(0), num_kv_heads = scores.size(1), resident = scores.size(2);
  const int64_t num_candidates = resident - sinks - window, count = kept - sinks - window;
  TORCH_CHECK(
      sinks >= 0 && window >= 0 && num_candidates >= 0 && count <= num_candidates,
      "cannot keep ", kept, " of ", resident, " tokens with ", sinks, " sinks and a window of ", window);
  const at::Tensor rows = scores.stride(2) == 1 ? scores : scores.contiguous();
  at::Tensor is_kept = at::ones(scores.sizes(), scores.options().dtype(at::kBool));
  const float* first_score = rows.const_data_ptr<float>() + sinks;
  bool* first_flag = is_kept.mutable_data_ptr<bool>() + sinks;
  const auto candidates_of = [&](int64_t layer, int64_t head) {
    return first_score + layer * rows.stride(0) + head * rows.stride(1);
  };
  const auto flags_of = [&](int64_t layer, int64_t head) { return first_flag + (layer * num_kv_heads + head) * resident; };

  const int64_t grain = kScoresPerThread / std::max<int64_t>(1, num_candidates * num_kv_heads) + 1;
  at::parallel_for(0, num_layers, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> ranks;
    std::vector<float> mean_scores;
    for (int64_t layer = begin; layer < end; ++layer) {
      mean_scores.assign(num_candidates, 0.0f);
      for (int64_t head = 0; head < num_kv_heads; ++head) {
        std::fill_n(flags_of(layer, head), num_candidates, false);
        if (shared_by_heads) {
          add_standardised(candidates_of(layer, head), num_candidates, num_kv_heads, mean_scores);
        } else {
          mark_highest(candidates_of(layer, head), num_candidates, count, flags_of(layer, head), ranks);
        }
      }
      if (shared_by_heads) {
        mark_highest(mean_scores.data(), num_candidates, count, flags_of(layer, 0), ranks);
        for (int64_t head = 1; head < num_kv_heads; ++head) {
          std::copy_n(flags_of(layer, 0), num_candidates, flags_of(layer, head));
        }
      }
    }
  });
  return is_kept;
}

}  // namespace vllm_qfilters
