"""``vllm-qfilters generate``: completions for a JSONL file of prompts.

:mod:`command` reads the arguments and asks the engine, :mod:`offline` reads and writes the files, :mod:`ray` spreads
the batches over engines on many machines.
"""
