"""Train a ComCAT adapter on images of a subject, DreamBooth style.

    accelerate launch -m comcat_hf.training.dreambooth sd15_dreambooth \
        --instance_data_dir photos --instance_prompt "a photo of sks dog" --output_dir dog-adapter

`--help` lists the flags, which are named as in diffusers' DreamBooth scripts.
"""

import sys
from functools import partial

from ..programs import ending, run_program
from .loop import customize
from .settings import parse_customize_settings


def main() -> int:
    """Run the training that the command line describes; returns the exit code."""
    close = partial(ending, made="The adapter")
    return run_program(parse_customize_settings, customize, close, ("datasets", "diffusers", "transformers"))


if __name__ == "__main__":
    sys.exit(main())
