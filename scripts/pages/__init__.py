"""The pages that scripts/make_docs.py writes: what was measured, and what can be set."""
