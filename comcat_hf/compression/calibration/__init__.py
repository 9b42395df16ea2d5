"""Calibration: statistics of a model's activations, and how far its output moves."""
