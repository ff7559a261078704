"""The engine process: counts, pages and plans. Imports no kernels and nothing of the workers."""
