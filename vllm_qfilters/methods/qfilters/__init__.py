"""Q-Filters (Godey et al. 2025, arXiv 2503.02812): what the model's queries, known from calibration, will attend to."""
