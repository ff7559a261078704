#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "key_tiles.h"
#include "operators.h"

namespace vllm_qfilters {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

struct Place {
  int64_t page;
  int64_t slot;
};

// Tokens in neighbouring slots of a page that go to neighbouring slots. None of them but the first is in a slot whose
// number is a multiple of kLanes, before or after: layouts are regular up to there.
struct Move {
  Place from;
  Place to;
  int64_t count;
};

// Finds where the tokens that stay go, in an order in which none is lost: the j-th one goes to the j-th place outside
// the pages taken out. Those that move back come first, the first of them first; those that move on, which is what goes
// behind the pages taken out, the last one first.
void find_moves(
    const bool* is_kept, int64_t resident, int64_t first_out, int64_t after_out, const int64_t* page_table,
    int64_t block_size, std::vector<Move>& moves, std::vector<Move>& moves_on) {
  const auto place_of = [&](int64_t token) { return Place{page_table[token / block_size], token % block_size}; };
  const auto follows = [](const Place& place, const Place& first, int64_t count) {
    return place.page == first.page && place.slot == first.slot + count && place.slot % kLanes != 0;
  };
  moves.clear();
  moves_on.clear();
  int64_t place = first_out == 0 ? after_out : 0;
  for (int64_t token = 0; token < resident; ++token) {
    if (!is_kept[token]) {
      continue;
    }
    TORCH_CHECK(place < resident, "more tokens stay than there are places outside the pages taken out");
    const Move move{place_of(token), place_of(place), 1};
    if (place > token) {
      moves_on.push_back(move);
    } else if (place < token) {
      Move* last = moves.empty() ? nullptr : &moves.back();
      if (last != nullptr && follows(move.from, last->from, last->count) && follows(move.to, last->to, last->count)) {
        ++last->count;
      } else {
        moves.push_back(move);
      }
    }
    ++place;
    place = place == first_out ? after_out : place;
  }
  TORCH_CHECK(place == resident, "fewer tokens stay than there are places outside the pages taken out");
  moves.insert(moves.end(), moves_on.rbegin(), moves_on.rend());
}

// The pages of one head of a layer. Their elements are only copied, so that their bytes are all that matters of their
// type.
template <typename Element>
struct HeadPages {
  Element* first;
  int64_t stride;

  Element* at(const Place& place) const {
    return first + place.page * stride;
  }
};

// Moves tokens whose elements lie side by side, kSize of them at least.
//
// places: of tokens; RowLayout::kByRow for kSize = kLanes, any for 1
template <int64_t kSize, typename Element>
void move_rows(const HeadPages<Element>& pages, const RowPlaces& places, const std::vector<Move>& moves) {
  for (const Move& move : moves) {
    const Element* from = pages.at(move.from);
    Element* to = pages.at(move.to);
    for (int64_t token = 0; token < move.count; ++token) {
      const int64_t* from_offsets = places.offsets + (move.from.slot + token) * places.row_size;
      const int64_t* to_offsets = places.offsets + (move.to.slot + token) * places.row_size;
      for (int64_t index = 0; index < places.row_size; index += kSize) {
        std::copy_n(from + from_offsets[index], kSize, to + to_offsets[index]);
      }
    }
  }
}

// Moves tokens of which two lie element by element: one half of each pair of elements.
//
// places: of tokens, RowLayout::kInPairs
template <typename Element>
ALWAYS_INLINE void move_halves_of(
    const HeadPages<Element>& pages, const RowPlaces& places, const std::vector<Move>& moves) {
  constexpr int kBits = 8 * sizeof(Element);
  constexpr uint32_t kFirst = (1u << kBits) - 1;
  for (const Move& move : moves) {
    const Element* from = pages.at(move.from);
    Element* to = pages.at(move.to);
    for (int64_t token = 0; token < move.count; ++token) {
      const int64_t from_slot = move.from.slot + token, to_slot = move.to.slot + token;
      const int64_t* from_offsets = places.offsets + from_slot / 2 * 2 * places.row_size;
      const int64_t* to_offsets = places.offsets + to_slot / 2 * 2 * places.row_size;
      const int from_shift = from_slot % 2 * kBits, to_shift = to_slot % 2 * kBits;
      for (int64_t index = 0; index < places.row_size; index += kLanes) {
        PatternPairs<Element> source, target;
        std::memcpy(&source, from + from_offsets[index], sizeof(source));
        std::memcpy(&target, to + to_offsets[index], sizeof(target));
        const Words elements = (__builtin_convertvector(source, Words) >> from_shift & kFirst) << to_shift;
        const Words others = __builtin_convertvector(target, Words) & ~(kFirst << to_shift);
        target = __builtin_convertvector(elements | others, PatternPairs<Element>);
        std::memcpy(to + to_offsets[index], &target, sizeof(target));
      }
    }
  }
}

CLONE_FOR_WIDER_VECTORS
void move_halves(const HeadPages<uint16_t>& pages, const RowPlaces& places, const std::vector<Move>& moves) {
  move_halves_of(pages, places, moves);
}

CLONE_FOR_WIDER_VECTORS
void move_halves(const HeadPages<uint8_t>& pages, const RowPlaces& places, const std::vector<Move>& moves) {
  move_halves_of(pages, places, moves);
}

// Moves tokens that lie side by side, dimension by dimension, or two dimensions at a time.
//
// places: of dimensions, not RowLayout::kAny
template <typename Element>
void move_columns(const HeadPages<Element>& pages, const RowPlaces& places, const std::vector<Move>& moves) {
  const int64_t at_once = places.layout == RowLayout::kInPairs ? 2 : 1;
  for (const Move& move : moves) {
    const Element* from = pages.at(move.from);
    Element* to = pages.at(move.to);
    for (int64_t dim = 0; dim < places.num_rows; dim += at_once) {
      const int64_t* offsets = places.offsets + dim * places.row_size;
      std::copy_n(from + offsets[move.from.slot], move.count * at_once, to + offsets[move.to.slot]);
    }
  }
}

// Where the keys, or the values, of a page lie: of tokens, and of dimensions.
template <typename Element>
class Contents {
 public:
  // offsets: [block_size, elements of a token] int64; must outlive this
  explicit Contents(const at::Tensor& offsets)
      : transposed_(offsets.t().contiguous()),
        tokens_(places_of<Element>(offsets)),
        dims_(places_of<Element>(transposed_)) {}

  void move(const HeadPages<Element>& pages, const std::vector<Move>& moves) const {
    if (tokens_.layout == RowLayout::kByRow) {
      move_rows<kLanes>(pages, tokens_, moves);
    } else if (dims_.layout != RowLayout::kAny) {
      move_columns(pages, dims_, moves);
    } else if (tokens_.layout == RowLayout::kInPairs) {
      if constexpr (sizeof(Element) < sizeof(uint32_t)) {
        move_halves(pages, tokens_, moves);
      }
    } else {
      move_rows<1>(pages, tokens_, moves);
    }
  }

 private:
  const at::Tensor transposed_;
  const RowPlaces tokens_, dims_;
};

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
  const Contents<Element> keys(key_offsets), values(value_offsets);
  const int64_t grain = kElementsPerThread / std::max<int64_t>(1, resident * key_offsets.size(1)) + 1;
  at::parallel_for(0, num_layers * num_kv_heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<Move> moves, moves_on;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t layer = index / num_kv_heads, head = index % num_kv_heads;
      find_moves(mask + index * resident, resident, first_out, after_out, table, block_size, moves, moves_on);
      const HeadPages<Element> head_pages{
          first_page + layer * pages.stride(0) + head * pages.stride(2), pages.stride(1)};
      keys.move(head_pages, moves);
      values.move(head_pages, moves);
      for (int64_t plane = 0; plane < num_planes; ++plane) {
        const HeadPages<float> numbers{
            first_plane + layer * planes.stride(0) + plane * planes.stride(2) + head * planes.stride(3),
            planes.stride(1)};
        for (const Move& move : moves) {
          std::copy_n(numbers.at(move.from) + move.from.slot, move.count, numbers.at(move.to) + move.to.slot);
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
      key_offsets.is_contiguous() && value_offsets.is_contiguous() &&
          key_offsets.numel() + value_offsets.numel() == pages.size(3),
      "contiguous offsets of keys and values must cover the pages, of ", pages.size(3), " elements, found ",
      key_offsets.numel(), " and ", value_offsets.numel());
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
