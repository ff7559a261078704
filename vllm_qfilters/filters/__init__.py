"""Q-Filters: what they are computed from, how they are stored, found and calibrated."""
