"""Closed forms of the factors: pure tensor maths, without models."""
