#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

struct Place {
  int64_t page;
  int64_t slot;
};

struct Move {
  Place from;
  Place to;
};

// Finds where the tokens that stay go, in an order in which none is lost: the j-th one goes to the j-th place outside
// the pages taken out. Those that move back come first, the first of them first; those that move on, which is what goes
// behind the pages taken out, the last one first.
void find_moves(
    const bool* is_kept, int64_t resident, int64_t first_out, int64_t after_out, const int64_t* page_table,
    int64_t block_size, std::vector<Move>& moves, std::vector<Move>& moves_on) {
  const auto place_of = [&](int64_t token) { return Place{page_table[token / block_size], token % block_size}; };
  const auto first_place = [&](int64_t place) { return place == first_out ? after_out : place; };
  moves.clear();
  moves_on.clear();
  int64_t place = first_place(0);
  for (int64_t token = 0; token < resident; ++token) {
    if (!is_kept[token]) {
      continue;
    }
    TORCH_CHECK(place < resident, "more tokens stay than there are places outside the pages taken out");
    if (place != token) {
      (place < token ? moves : moves_on).push_back({place_of(token), place_of(place)});
    }
    place = first_place(place + 1);
  }
  TORCH_CHECK(place == resident, "fewer tokens stay than there are places outside the pages taken out");
  moves.insert(moves.end(), moves_on.rbegin(), moves_on.rend());
}

// Where the elements of keys, or of values, lie in a page: those of a slot in runs of `size`, which begin at
// first[slot]
// + steps[0], first[slot] + steps[1], ... All layouts of vLLM place the elements of one slot like those of another.
struct Runs {
  int64_t size;
  std::vector<int64_t> first, steps;
  bool slots_are_alike;
};

// offsets: [block_size, elements of a slot] int64, contiguous
Runs runs_of(const at::Tensor& offsets) {
  const int64_t num_slots = offsets.size(0), num_elements = offsets.size(1);
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  Runs runs{1, {}, {offset, offset + num_elements}, true};
  for (int64_t& step : runs.steps) {
    step -= *offset;
  }
  for (int64_t slot = 0; slot < num_slots && num_elements > 0; ++slot) {
    const int64_t* own = offset + slot * num_elements;
    runs.first.push_back(*own);
    if (!std::equal(
            own, own + num_elements, runs.steps.begin(), [&](int64_t at, int64_t step) { return at == *own + step; })) {
      runs.slots_are_alike = false;
    }
  }
  int64_t size = 1;
  while (size < num_elements && runs.steps[size] == size) {
    ++size;
  }
  std::vector<int64_t> begins;
  for (int64_t element = 0; element < num_elements; element += size) {
    begins.push_back(runs.steps[element]);
    for (int64_t next = element; next < std::min(element + size, num_elements); ++next) {
      if (num_elements % size != 0 || runs.steps[next] != begins.back() + next - element) {
        return runs;  // of unlike lengths: each element is one
      }
    }
  }
  runs.size = size;
  runs.steps = begins;
  return runs;
}

// Copies keys or values whose runs have kSize elements; kSize 0: any number.
template <int64_t kSize, typename Element>
void move_runs(Element* head_pages, int64_t page_stride, const Runs& runs, const std::vector<Move>& moves) {
  for (const Move& move : moves) {
    const Element* from = head_pages + move.from.page * page_stride + runs.first[move.from.slot];
    Element* to = head_pages + move.to.page * page_stride + runs.first[move.to.slot];
    for (const int64_t step : runs.steps) {
      std::copy_n(from + step, kSize == 0 ? runs.size : kSize, to + step);
    }
  }
}

template <typename Element>
void move_by_offsets(
    Element* head_pages, int64_t page_stride, const at::Tensor& offsets, const std::vector<Move>& moves) {
  const int64_t num_elements = offsets.size(1);
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  for (const Move& move : moves) {
    const Element* from = head_pages + move.from.page * page_stride;
    Element* to = head_pages + move.to.page * page_stride;
    const int64_t* from_offset = offset + move.from.slot * num_elements;
    const int64_t* to_offset = offset + move.to.slot * num_elements;
    for (int64_t element = 0; element < num_elements; ++element) {
      to[to_offset[element]] = from[from_offset[element]];
    }
  }
}

// Elements are only copied, so that their bytes are all that matters of their type.
template <typename Element>
void move_elements(
    Element* head_pages, int64_t page_stride, const at::Tensor& offsets, const Runs& runs,
    const std::vector<Move>& moves) {
  if (!runs.slots_are_alike) {
    move_by_offsets(head_pages, page_stride, offsets, moves);
  } else if (runs.size == 1) {
    move_runs<1>(head_pages, page_stride, runs, moves);
  } else if (runs.size == 2) {
    move_runs<2>(head_pages, page_stride, runs, moves);
  } else {
    move_runs<0>(head_pages, page_stride, runs, moves);
  }
}

template <typename Element>
void close_gaps_of(
    at::Tensor& pages, at::Tensor& planes, const at::Tensor& key_offsets, const at::Tensor& value_offsets,
    const at::Tensor& page_table, const at::Tensor& is_kept, int64_t first_out, int64_t after_out) {
  const int64_t num_layers = pages.size(0), num_kv_heads = pages.size(2), num_planes = planes.size(2);
  const int64_t block_size = planes.size(4), resident = is_kept.size(2);
  Element* first_page = static_cast<Element*>(pages.mutable_data_ptr());
  float* first_plane = planes.mutable_data_ptr<float>();
  const bool* mask = is_kept.const_data_ptr<bool>();
  const int64_t* table = page_table.const_data_ptr<int64_t>();
  const Runs keys = runs_of(key_offsets), values = runs_of(value_offsets);
  const int64_t grain = kElementsPerThread / std::max<int64_t>(1, resident * key_offsets.size(1)) + 1;
  at::parallel_for(0, num_layers * num_kv_heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<Move> moves, moves_on;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t layer = index / num_kv_heads, head = index % num_kv_heads;
      find_moves(mask + index * resident, resident, first_out, after_out, table, block_size, moves, moves_on);
      Element* head_pages = first_page + layer * pages.stride(0) + head * pages.stride(2);
      move_elements(head_pages, pages.stride(1), key_offsets, keys, moves);
      move_elements(head_pages, pages.stride(1), value_offsets, values, moves);
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

void close_gaps(
    at::Tensor& pages, at::Tensor& planes, const at::Tensor& key_offsets, const at::Tensor& value_offsets,
    const at::Tensor& page_table, const at::Tensor& is_kept, int64_t first_out, int64_t after_out) {
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
  TORCH_CHECK(0 <= first_out && first_out <= after_out && after_out <= resident, "tokens taken out must be resident");
  switch (pages.element_size()) {
    case 1:
      return close_gaps_of<uint8_t>(
          pages, planes, key_offsets, value_offsets, page_table, is_kept, first_out, after_out);
    case 2:
      return close_gaps_of<uint16_t>(
          pages, planes, key_offsets, value_offsets, page_table, is_kept, first_out, after_out);
    case 4:
      return close_gaps_of<uint32_t>(
          pages, planes, key_offsets, value_offsets, page_table, is_kept, first_out, after_out);
    default:
      TORCH_CHECK(false, "elements must have 1, 2 or 4 bytes, found ", pages.scalar_type());
  }
}

}  // namespace vllm_qfilters
