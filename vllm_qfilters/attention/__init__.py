"""Attention backends that score keys as they are written."""
