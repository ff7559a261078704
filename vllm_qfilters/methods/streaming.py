"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453)."""

from vllm_qfilters.methods.base import Method


class Streaming(Method):
    """Keeps the first tokens, the attention sinks, and the most recent ones.

    Nothing is scored: the scheduler makes the window as long as the budget allows, so that no choice is left. Cost:
    none.
    """
