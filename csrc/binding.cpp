#include <torch/library.h>

#include "operators.h"

TORCH_LIBRARY(vllm_qfilters, library) {
  library.def("score_and_store(Tensor key, Tensor filters, Tensor(a!) score_plane, Tensor slot_mapping) -> ()");
  library.def("mean_standardised(Tensor scores, int sinks, int window) -> Tensor");
  library.def("select_kept(Tensor scores, int kept, int sinks, int window) -> Tensor");
  library.def("page_scores(Tensor score_plane, Tensor pages, Tensor mean, Tensor deviation) -> Tensor");
  library.def(
      "expected_attention(Tensor pages, Tensor key_offsets, Tensor page_table, int num_tokens, Tensor means, "
      "Tensor factors, Tensor? group_sizes, Tensor? sinks, float soft_cap) -> Tensor");
  library.def(
      "observed_attention(Tensor pages, Tensor key_offsets, Tensor page_table, int num_tokens, Tensor queries, "
      "Tensor? group_sizes, Tensor? sinks, float soft_cap) -> (Tensor, Tensor)");
  library.def("distinctness(Tensor pages, Tensor offsets, Tensor page_table, int num_tokens, int pool) -> Tensor");
  library.def("value_norms(Tensor pages, Tensor offsets, Tensor page_table, int num_tokens) -> Tensor");
  library.def(
      "close_gaps(Tensor(a!) pages, Tensor(b!) planes, Tensor key_offsets, Tensor value_offsets, Tensor page_table, "
      "Tensor is_kept, int first_out, int after_out) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_qfilters, CPU, library) {
  library.impl("score_and_store", &vllm_qfilters::score_and_store);
  library.impl("mean_standardised", &vllm_qfilters::mean_standardised);
  library.impl("select_kept", &vllm_qfilters::select_kept);
  library.impl("page_scores", &vllm_qfilters::page_scores);
  library.impl("expected_attention", &vllm_qfilters::expected_attention);
  library.impl("observed_attention", &vllm_qfilters::observed_attention);
  library.impl("distinctness", &vllm_qfilters::distinctness);
  library.impl("value_norms", &vllm_qfilters::value_norms);
  library.impl("close_gaps", &vllm_qfilters::close_gaps);
}
