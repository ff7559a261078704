"""``vllm-qfilters inspect``: shows on a page what the cache kept of a prompt.

:mod:`command` asks the engine, :mod:`page` renders what it answered.
"""
