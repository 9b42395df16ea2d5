"""The differentiable search of ranks."""
