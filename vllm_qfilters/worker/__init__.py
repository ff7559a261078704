"""The worker processes: apply the scheduler's plans to the cache and run the model on what is left."""
