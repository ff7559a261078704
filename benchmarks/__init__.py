"""The cases that measure, and their results. ``python -m benchmarks`` lists the cases."""
