#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

struct Bounds {
  int64_t first_out;
  int64_t after_out;
  int64_t after_displaced;
};

struct Place {
  int64_t page;
  int64_t slot;
};

struct Move {
  Place from;
  Place to;
};

// Pairs the tokens that must move with the places that are free for them, both in order.
void find_moves(
    const bool* is_kept, int64_t resident, const Bounds& bounds, const int64_t* page_table, int64_t block_size,
    std::vector<Move>& moves) {
  const auto place_of = [&](int64_t token) { return Place{page_table[token / block_size], token % block_size}; };
  const auto is_hole = [&](int64_t token) {
    return token < bounds.first_out || token >= bounds.after_displaced ? !is_kept[token] : token >= bounds.after_out;
  };
  int64_t hole = 0;
  const auto find_hole = [&] {
    while (hole < resident && !is_hole(hole)) {
      ++hole;
    }
    return hole < resident;
  };
  moves.clear();
  for (int64_t token = bounds.first_out; token < bounds.after_displaced; ++token) {
    if (is_kept[token]) {
      TORCH_CHECK(find_hole(), "more tokens survive in the pages taken out than there are holes outside them");
      moves.push_back({place_of(token), place_of(hole)});
      ++hole;
    }
  }
  TORCH_CHECK(!find_hole(), "fewer tokens survive in the pages taken out than there are holes outside them");
  // Tokens that make room for sinks move later in this order than those that take their places: last first, so that
  // none is lost.
  std::reverse(moves.begin(), moves.end());
}

// Elements are only copied, so that their bytes are all that matters of their type.
template <typename Element>
void move_elements(
    Element* head_pages, int64_t page_stride, const at::Tensor& offsets, const std::vector<Move>& moves) {
  const int64_t head_size = offsets.size(1);
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  for (const Move& move : moves) {
    const Element* from = head_pages + move.from.page * page_stride;
    Element* to = head_pages + move.to.page * page_stride;
    const int64_t* from_offset = offset + move.from.slot * head_size;
    const int64_t* to_offset = offset + move.to.slot * head_size;
    for (int64_t dim = 0; dim < head_size; ++dim) {
      to[to_offset[dim]] = from[from_offset[dim]];
    }
  }
}

template <typename Element>
void fill_holes_of(
    at::Tensor& pages, at::Tensor& planes, const at::Tensor& key_offsets, const at::Tensor& value_offsets,
    const at::Tensor& page_table, const at::Tensor& is_kept, const Bounds& bounds) {
  const int64_t num_layers = pages.size(0), num_kv_heads = pages.size(2), num_planes = planes.size(2);
  const int64_t block_size = planes.size(4), resident = is_kept.size(2);
  Element* first_page = static_cast<Element*>(pages.mutable_data_ptr());
  float* first_plane = planes.mutable_data_ptr<float>();
  const bool* mask = is_kept.const_data_ptr<bool>();
  const int64_t* table = page_table.const_data_ptr<int64_t>();
  const int64_t num_elements = (bounds.after_displaced - bounds.first_out) * key_offsets.size(1);
  const int64_t grain = kElementsPerThread / std::max<int64_t>(1, num_elements) + 1;
  at::parallel_for(0, num_layers * num_kv_heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<Move> moves;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t layer = index / num_kv_heads, head = index % num_kv_heads;
      find_moves(mask + index * resident, resident, bounds, table, block_size, moves);
      Element* head_pages = first_page + layer * pages.stride(0) + head * pages.stride(2);
      move_elements(head_pages, pages.stride(1), key_offsets, moves);
      move_elements(head_pages, pages.stride(1), value_offsets, moves);
      for (int64_t plane = 0; plane < num_planes; ++plane) {
        float* numbers = first_plane + layer * planes.stride(0) + plane * planes.stride(2) + head * planes.stride(3);
        for (const Move& move : moves) {
          numbers[move.to.page * planes.stride(1) + move.to.slot] =
              numbers[move.from.page * planes.stride(1) + move.from.slot];
        }
      }
    }
  });
}

}  // namespace

void fill_holes(
    at::Tensor& pages, at::Tensor& planes, const at::Tensor& key_offsets, const at::Tensor& value_offsets,
    const at::Tensor& page_table, const at::Tensor& is_kept, int64_t first_out, int64_t after_out,
    int64_t after_displaced) {
  TORCH_CHECK(
      pages.dim() == 4 && planes.dim() == 5 && is_kept.dim() == 3, "pages have 4 dimensions, planes 5, flags 3, found ",
      pages.dim(), ", ", planes.dim(), ", ", is_kept.dim());
  TORCH_CHECK(
      pages.stride(3) == 1 && planes.stride(4) == 1, "the elements of a page and of a plane must lie side by side");
  TORCH_CHECK(
      planes.scalar_type() == at::kFloat && planes.sizes().slice(0, 2) == pages.sizes().slice(0, 2) &&
          planes.size(3) == pages.size(2),
      "planes must be float32 for the pages ", pages.sizes(), ", found ", planes.scalar_type(), planes.sizes());
  const int64_t block_size = planes.size(4), resident = is_kept.size(2);
  check_offsets(key_offsets, block_size, pages.size(3));
  if (value_offsets.numel() > 0) {
    check_offsets(value_offsets, block_size, pages.size(3));
  }
  TORCH_CHECK(
      key_offsets.numel() + value_offsets.numel() == pages.size(3),
      "offsets of keys and values must cover the pages, of ", pages.size(3), " elements, found ", key_offsets.numel(),
      " and ", value_offsets.numel());
  TORCH_CHECK(
      is_kept.is_contiguous() && is_kept.scalar_type() == at::kBool && is_kept.size(0) == pages.size(0) &&
          is_kept.size(1) == pages.size(2),
      "flags must be contiguous and bool for the layers and heads of the pages ", pages.sizes(), ", found ",
      is_kept.sizes());
  check_page_table(page_table, pages.size(1), block_size, resident);
  TORCH_CHECK(
      0 <= first_out && first_out <= after_out && after_out <= after_displaced && after_displaced <= resident,
      "tokens taken out and displaced must be resident");
  const Bounds bounds{first_out, after_out, after_displaced};
  switch (pages.element_size()) {
    case 1:
      return fill_holes_of<uint8_t>(pages, planes, key_offsets, value_offsets, page_table, is_kept, bounds);
    case 2:
      return fill_holes_of<uint16_t>(pages, planes, key_offsets, value_offsets, page_table, is_kept, bounds);
    case 4:
      return fill_holes_of<uint32_t>(pages, planes, key_offsets, value_offsets, page_table, is_kept, bounds);
    default:
      TORCH_CHECK(false, "elements must have 1, 2 or 4 bytes, found ", pages.scalar_type());
  }
}

}  // namespace vllm_qfilters
