"""Compress an image classifier and fine-tune it with distillation.

    accelerate launch -m comcat_hf.training.classify --model_name_or_path facebook/deit-small-patch16-224 \
        --train_dir imagenet/train --validation_dir imagenet/val --reduction 0.5 --output_dir deit-small-comcat

`--help` lists the flags, which are named as in the image classification scripts of transformers.
"""

import sys
from functools import partial

from ..programs import ending, run_program
from .run import compress_vit
from .settings import parse_compress_settings


def main() -> int:
    """Run the stages that the command line describes; returns the exit code."""
    close = partial(ending, made="The model")
    return run_program(parse_compress_settings, compress_vit, close, ("datasets", "transformers"))


if __name__ == "__main__":
    sys.exit(main())
