// The operators of torch.ops.vllm_qfilters on a CPU. kernels/reference.py states what each computes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace vllm_qfilters {

void score_and_store(
    const at::Tensor& key,            // [num_tokens, num_kv_heads, head_size] bfloat16, float16 or float32
    const at::Tensor& filters,        // [num_kv_heads, head_size] float32
    at::Tensor& score_plane,          // [num_blocks, num_kv_heads, block_size] float32
    const at::Tensor& slot_mapping);  // [num_tokens] int64, -1: padding

at::Tensor mean_standardised(         // [num_layers, 1, resident_tokens] float32
    const at::Tensor& scores,         // [num_layers, num_kv_heads, resident_tokens] float32
    int64_t sinks,
    int64_t window);

at::Tensor select_kept(               // [num_layers, num_heads, resident_tokens] bool
    const at::Tensor& scores,         // [num_layers, num_heads, resident_tokens] float32
    int64_t kept,
    int64_t sinks,
    int64_t window);

at::Tensor page_scores(               // [num_pages] float32
    const at::Tensor& score_plane,    // [num_layers, num_blocks, num_kv_heads, block_size] float32
    const at::Tensor& pages,          // [num_pages] int64
    const at::Tensor& mean,           // [num_layers, num_kv_heads] float32
    const at::Tensor& deviation);     // [num_layers, num_kv_heads] float32

at::Tensor expected_attention(        // [num_layers, num_kv_heads, num_tokens] float32
    const at::Tensor& pages,          // [num_layers, num_blocks, num_kv_heads, block_size * (head_size + value_size)]
    const at::Tensor& key_offsets,    // [block_size, head_size] int64
    const at::Tensor& page_table,     // [num_pages] int64
    int64_t num_tokens,
    const at::Tensor& means,          // [num_layers, num_heads, head_size] float32
    const at::Tensor& factors,        // [num_layers, num_heads, rank, head_size] float32
    const std::optional<at::Tensor>& group_sizes,  // [num_layers] int64: of the query heads of a KV head, the first count
    const std::optional<at::Tensor>& sinks,        // [num_layers, num_heads] float32: logits beside those of the tokens
    double soft_cap);                 // of logits; 0: none

// Of the last queries of a sequence, the last of which is that of the last token: the mean over queries and the query
// heads of a KV head, and the most; no neighbours yet.
std::tuple<at::Tensor, at::Tensor> observed_attention(  // [num_layers, num_kv_heads, num_tokens] float32 each
    const at::Tensor& pages,          // [num_layers, num_blocks, num_kv_heads, block_size * (head_size + value_size)]
    const at::Tensor& key_offsets,    // [block_size, head_size] int64
    const at::Tensor& page_table,     // [num_pages] int64
    int64_t num_tokens,
    const at::Tensor& queries,        // [num_layers, num_heads, num_queries, head_size] float32
    const std::optional<at::Tensor>& group_sizes,  // as of expected_attention, like the rest
    const std::optional<at::Tensor>& sinks,
    double soft_cap);

// Minus the cosine of each key or value with their mean direction in its head, averaged over neighbours.
at::Tensor distinctness(              // [num_layers, num_kv_heads, num_tokens] float32
    const at::Tensor& pages,          // [num_layers, num_blocks, num_kv_heads, block_size * (head_size + value_size)]
    const at::Tensor& offsets,        // [block_size, size of a key or value] int64
    const at::Tensor& page_table,     // [num_pages] int64
    int64_t num_tokens,
    int64_t pool);                    // neighbours, odd

at::Tensor value_norms(               // [num_layers, num_kv_heads, num_tokens] float32
    const at::Tensor& pages,          // [num_layers, num_blocks, num_kv_heads, block_size * (head_size + value_size)]
    const at::Tensor& offsets,        // [block_size, size of a value] int64
    const at::Tensor& page_table,     // [num_pages] int64
    int64_t num_tokens);

// Tokens that stay move up in their order, around pages taken out.
void close_gaps(
    at::Tensor& pages,                // [num_layers, num_blocks, num_kv_heads, block_size * (head_size + value_size)]
    at::Tensor& planes,               // [num_layers, num_blocks, num_planes, num_kv_heads, block_size] float32
    const at::Tensor& key_offsets,    // [block_size, head_size] int64
    const at::Tensor& value_offsets,  // [block_size, value_size] int64; no elements where keys stand alone
    const at::Tensor& page_table,     // [num_pages] int64
    const at::Tensor& is_kept,        // [num_layers, num_kv_heads, resident_tokens] bool
    int64_t first_out,                // tokens from here on are taken out ...
    int64_t after_out);               // ... up to here

}  // namespace vllm_qfilters
