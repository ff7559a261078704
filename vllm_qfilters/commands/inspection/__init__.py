"""``vllm-qfilters inspect``: what the cache kept of a prompt, as a page to look at."""
