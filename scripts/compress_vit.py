"""Compress an image classifier and fine-tune it with distillation.

    accelerate launch scripts/compress_vit.py --model_name_or_path facebook/deit-small-patch16-224 \
        --train_dir imagenet/train --validation_dir imagenet/val --reduction 0.5 --output_dir deit-small-comcat

`--help` lists the flags, which are named as in the image classification scripts of transformers.
"""

import logging
import os
import sys

from launched import say_error

from comcat_hf.errors import ComCATError
from comcat_hf.training.classify.run import compress_vit
from comcat_hf.training.classify.settings import parse_compress_settings


def main(arguments: list[str]) -> int:
    """Run the stages that the arguments describe; returns the exit code."""
    main_process = int(os.environ.get("RANK", "0")) == 0
    if not main_process:
        _be_quiet()

    def say(text: str) -> None:
        if main_process:
            print(text, file=sys.stderr, flush=True)

    try:
        result = compress_vit(parse_compress_settings(arguments), report=say)
    except ComCATError as error:
        if main_process:
            say_error(error)
        return 2
    if result.interrupted is not None:
        place = f" and saved in {result.checkpoint}" if result.checkpoint else ""
        say(f"Stopped by {result.interrupted}{place}. Go on with --resume_from_checkpoint latest.")
    elif not result.plan.settings.dry_run:
        say(f"The model is in {result.output_dir}" + (f", and at {result.commit}" if result.commit else "") + ".")
    return 0


def _be_quiet() -> None:
    """Leave bars and warnings to the main process."""
    import datasets
    from transformers.utils import logging as of_transformers

    datasets.disable_progress_bars()
    of_transformers.disable_progress_bar()
    logging.getLogger("comcat_hf").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
