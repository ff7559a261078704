"""The command ``vllm-qfilters size``: what a memory holds with and without compression, from a configuration alone."""
