// Keys of a sequence, gathered from its pages tile by tile, and their products with query vectors.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "lanes.h"

namespace vllm_qfilters {

constexpr int64_t kTile = 4 * kLanes;  // tokens whose keys are projected at once

// out[vector, token] = <vectors[vector], keys[token]> for kTile tokens; keys are stored dimension by dimension,
// key_stride tokens each, and out vector by vector.
void project_tile(
    const float* vectors, int64_t num_vectors, const float* keys, int64_t key_stride, int64_t head_size, float* out);

// logits become e^(logit - highest). Returns what a softmax divides them by: their sum, and what the sink adds to it.
float exponentiate_all(float* logits, int64_t count, float sink);

// logits become cap * tanh(logit / cap).
void soften(float* logits, int64_t count, float cap);

// How the elements of rows lie in a page: row by row, or pairs of rows element by element; in runs of kLanes elements
// either way. The rows of keys are dimensions, row by row in vLLM's "vec" and in pairs in its "amx"; those of values
// are tokens, likewise.
enum class RowLayout { kAny, kByRow, kInPairs };

struct RowPlaces {
  RowLayout layout;
  int64_t num_rows, row_size;
  const int64_t* offsets;  // [num_rows, row_size]
};

// rows[row * stride + index] becomes element first + index of a row, for the first rows, to the end of the last one's
// pair, and for `count` elements, and those up to the next multiple of kLanes. Not for RowLayout::kAny.
void widen_rows(
    const float*, const RowPlaces&, int64_t num_rows, int64_t first, int64_t count, float* rows, int64_t stride);
void widen_rows(
    const c10::BFloat16*, const RowPlaces&, int64_t num_rows, int64_t first, int64_t count, float* rows,
    int64_t stride);
void widen_rows(
    const c10::Half*, const RowPlaces&, int64_t num_rows, int64_t first, int64_t count, float* rows, int64_t stride);
void widen_rows(
    const c10::Float8_e4m3fn*, const RowPlaces&, int64_t num_rows, int64_t first, int64_t count, float* rows,
    int64_t stride);
void widen_rows(
    const c10::Float8_e5m2*, const RowPlaces&, int64_t num_rows, int64_t first, int64_t count, float* rows,
    int64_t stride);

// offsets: [num_rows, row_size] int64, contiguous; must outlive what is returned
template <typename Element>
RowPlaces places_of(const at::Tensor& offsets) {
  const int64_t num_rows = offsets.size(0), row_size = offsets.size(1);
  RowLayout layout = RowLayout::kAny;
  if (offsets.numel() > 0 && row_size % kLanes == 0) {
    const at::Tensor steps = offsets.view({num_rows, -1, kLanes}).diff();
    if (steps.eq(1).all().item<bool>()) {
      layout = RowLayout::kByRow;
    } else if (
        sizeof(Element) < sizeof(float) && num_rows % 2 == 0 && steps.eq(2).all().item<bool>() &&
        offsets.view({-1, 2, row_size}).diff(1, 1).eq(1).all().item<bool>()) {
      layout = RowLayout::kInPairs;
    }
  }
  return {layout, num_rows, row_size, offsets.const_data_ptr<int64_t>()};
}

// widen_rows, for any layout.
template <typename Element>
void gather_rows(
    const Element* page, const RowPlaces& places, int64_t num_rows, int64_t first, int64_t count, float* rows,
    int64_t stride) {
  if (places.layout != RowLayout::kAny) {
    widen_rows(page, places, num_rows, first, count, rows, stride);
    return;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t* offsets = places.offsets + row * places.row_size + first;
    for (int64_t index = 0; index < count; ++index) {
      rows[row * stride + index] = static_cast<float>(page[offsets[index]]);
    }
  }
}

// The keys of all layers and heads of a sequence.
//
// pages: [num_layers, num_blocks, num_kv_heads, block_size * (head_size + value_size)]
// key_offsets: [block_size, head_size] int64, where the elements of a key lie in the pages of a head
// page_table: [num_pages] int64
template <typename Element>
class PagedKeys {
 public:
  PagedKeys(const at::Tensor& pages, const at::Tensor& key_offsets, const at::Tensor& page_table)
      : pages_(pages),
        offsets_(key_offsets.t().contiguous()),
        places_(places_of<Element>(offsets_)),
        page_table_(page_table.const_data_ptr<int64_t>()),
        gathered_((places_.row_size + kTile - 1) / kTile * kTile) {}

  // Calls see(first, count, keys, key_stride) for page after page of the tokens of one head: keys[dim * key_stride +
  // index] is of token first + index, and those up to the next multiple of kTile can be read, too.
  template <typename See>
  void visit(int64_t layer, int64_t head, int64_t num_tokens, See see) const {
    std::vector<Line> lines(places_.num_rows * gathered_ / kLanes);
    float* keys = lines.data()->floats;
    const Element* head_pages =
        static_cast<const Element*>(pages_.const_data_ptr()) + layer * pages_.stride(0) + head * pages_.stride(2);
    for (int64_t first = 0; first < num_tokens; first += gathered_) {
      const int64_t count = std::min(gathered_, num_tokens - first);
      gather(head_pages, first, count, keys);
      see(first, count, static_cast<const float*>(keys), gathered_);
    }
  }

  // Calls see(first, count, products) for tile after tile of the tokens of one head: products[vector * kTile + index]
  // is that of vectors[vector] and the key of token first + index.
  template <typename See>
  void project(
      int64_t layer, int64_t head, int64_t num_tokens, const float* vectors, int64_t num_vectors, See see) const {
    std::vector<Line> lines(num_vectors * kTile / kLanes);
    float* products = lines.data()->floats;
    visit(layer, head, num_tokens, [&](int64_t first, int64_t count, const float* keys, int64_t key_stride) {
      for (int64_t done = 0; done < count; done += kTile) {
        project_tile(vectors, num_vectors, keys + done, key_stride, places_.num_rows, products);
        see(first + done, std::min(kTile, count - done), static_cast<const float*>(products));
      }
    });
  }

 private:
  // Keys of tokens [first, first + count) of one head, dimension by dimension.
  void gather(const Element* head_pages, int64_t first, int64_t count, float* keys) const {
    const int64_t block_size = places_.row_size;
    int64_t in_page;
    for (int64_t done = 0; done < count; done += in_page) {
      const int64_t token = first + done, slot = token % block_size;
      const Element* page = head_pages + page_table_[token / block_size] * pages_.stride(1);
      in_page = std::min(count - done, block_size - slot);
      gather_rows(page, places_, places_.num_rows, slot, in_page, keys + done, gathered_);
    }
  }

  const at::Tensor& pages_;
  const at::Tensor offsets_;
  const RowPlaces places_;
  const int64_t* page_table_;
  // Tokens whose keys are gathered at once: a whole page, which is read from its start to its end.
  const int64_t gathered_;
};

// Calls run with an element of the type that the pages are made of.
template <typename Run>
void with_element_of(const at::Tensor& pages, Run run) {
  switch (pages.scalar_type()) {
    case at::kFloat:
      return run(float());
    case at::kBFloat16:
      return run(c10::BFloat16());
    case at::kHalf:
      return run(c10::Half());
    case at::kFloat8_e4m3fn:
      return run(c10::Float8_e4m3fn());
    case at::kFloat8_e5m2:
      return run(c10::Float8_e5m2());
    default:
      TORCH_CHECK(false, "pages must be float32, bfloat16, float16 or fp8, found ", pages.scalar_type());
  }
}

// Calls run(PagedKeys<Element>) for what the pages are made of.
template <typename Run>
void with_paged_keys(const at::Tensor& pages, const at::Tensor& key_offsets, const at::Tensor& page_table, Run run) {
  with_element_of(pages, [&](auto element) { run(PagedKeys<decltype(element)>(pages, key_offsets, page_table)); });
}

// How the layers of a model make attention of logits.
class Softmax {
 public:
  // group_sizes: [num_layers] int64, how many of the query heads that a KV head has in every layer count
  // sinks: [num_layers, num_heads] float32, a logit beside those of the tokens
  // num_heads: query heads of every layer, those that do not count among them
  Softmax(
      const std::optional<at::Tensor>& group_sizes, const std::optional<at::Tensor>& sinks, double soft_cap,
      int64_t num_layers, int64_t num_heads, int64_t num_kv_heads)
      : num_heads_(num_heads), group_(num_heads / num_kv_heads), soft_cap_(static_cast<float>(soft_cap)) {
    if (group_sizes.has_value()) {
      TORCH_CHECK(
          group_sizes->is_contiguous() && group_sizes->scalar_type() == at::kLong && group_sizes->dim() == 1 &&
              group_sizes->size(0) == num_layers,
          "group_sizes must be contiguous int64 for ", num_layers, " layers, found ", group_sizes->scalar_type(),
          group_sizes->sizes());
      group_sizes_ = group_sizes->const_data_ptr<int64_t>();
      TORCH_CHECK(
          std::all_of(
              group_sizes_, group_sizes_ + num_layers, [&](int64_t size) { return 1 <= size && size <= group_; }),
          "group_sizes must lie between 1 and ", group_);
    }
    if (sinks.has_value()) {
      TORCH_CHECK(
          sinks->is_contiguous() && sinks->scalar_type() == at::kFloat && sinks->dim() == 2 &&
              sinks->size(0) == num_layers && sinks->size(1) == num_heads,
          "sinks must be contiguous float32 for ", num_layers, " layers and ", num_heads, " query heads, found ",
          sinks->scalar_type(), sinks->sizes());
      sinks_ = sinks->const_data_ptr<float>();
    }
  }

  // The query heads of a KV head that count.
  int64_t group_size(int64_t layer) const {
    return group_sizes_ == nullptr ? group_ : group_sizes_[layer];
  }

  float soft_cap() const {
    return soft_cap_;
  }

  // exponentiate_all for one query head of a KV head.
  float operator()(float* logits, int64_t count, int64_t layer, int64_t kv_head, int64_t member) const {
    const float none = -std::numeric_limits<float>::infinity();
    return exponentiate_all(
        logits, count, sinks_ == nullptr ? none : sinks_[layer * num_heads_ + kv_head * group_ + member]);
  }

 private:
  const int64_t num_heads_, group_;
  const float soft_cap_;
  const int64_t* group_sizes_ = nullptr;
  const float* sinks_ = nullptr;
};

inline void check_paged_keys(
    const at::Tensor& pages, const at::Tensor& key_offsets, const at::Tensor& page_table, int64_t num_tokens) {
  TORCH_CHECK(pages.dim() == 4, "pages have 4 dimensions, found ", pages.dim());
  TORCH_CHECK(pages.stride(3) == 1, "the elements of a page must lie side by side");
  TORCH_CHECK(num_tokens > 0, "there is no attention to ", num_tokens, " tokens");
  check_offsets(key_offsets, key_offsets.size(0), pages.size(3));
  check_page_table(page_table, pages.size(1), key_offsets.size(0), num_tokens);
}

// Of queries: [num_layers, num_heads, ..., head_size] for num_layers and whole groups of the num_kv_heads of the pages.
inline void check_queries(const at::Tensor& queries, const char* name, const at::Tensor& pages, int64_t head_size) {
  TORCH_CHECK(
      queries.is_contiguous() && queries.scalar_type() == at::kFloat && queries.dim() >= 3 &&
          queries.size(0) == pages.size(0) && queries.size(1) % pages.size(2) == 0 && queries.size(-1) == head_size,
      name, " must be contiguous and float32 for ", pages.size(0), " layers and query heads of size ", head_size,
      " in groups of the ", pages.size(2), " KV heads, found ", queries.scalar_type(), queries.sizes());
}

}  // namespace vllm_qfilters
