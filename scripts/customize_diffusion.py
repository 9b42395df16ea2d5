"""Train an adapter on images of a subject: the same as `accelerate launch -m comcat_hf.training.dreambooth`."""

import sys

from comcat_hf.training.dreambooth.__main__ import main


if __name__ == "__main__":
    sys.exit(main())
