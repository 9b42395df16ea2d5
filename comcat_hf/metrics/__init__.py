"""Metric modules for `evaluate`: files that `evaluate.load` takes by their path, without a network."""

from pathlib import Path


__all__ = ["TOP_ACCURACY"]

# evaluate.load(TOP_ACCURACY): top-1 and top-5 accuracy.
TOP_ACCURACY = str(Path(__file__).with_name("top_accuracy.py"))
