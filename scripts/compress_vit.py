"""Compress an image classifier and fine-tune it: the same as `accelerate launch -m comcat_hf.training.classify`."""

import sys

from comcat_hf.training.classify.__main__ import main


if __name__ == "__main__":
    sys.exit(main())
