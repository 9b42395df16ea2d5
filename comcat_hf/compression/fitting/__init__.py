"""Fitting factors to calibration data, layer by layer."""
