"""Measure an image classifier: the same as `accelerate launch -m comcat_hf.training.classify.evaluate`."""

import sys

from comcat_hf.training.classify.evaluate import main


if __name__ == "__main__":
    sys.exit(main())
