"""What was measured, and how: ``python -m benchmarks CASE MODEL``. ``python -m benchmarks`` lists the cases."""
