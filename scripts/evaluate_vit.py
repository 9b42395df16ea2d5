"""Measure an image classifier, compressed or dense: top-1, top-5, parameters, MACs and images per second.

    accelerate launch scripts/evaluate_vit.py --model_name_or_path deit-small-comcat \
        --dense facebook/deit-small-patch16-224 --validation_dir imagenet/val --batch_sizes 1,32

`--help` lists the flags; those of the data are named as in scripts/compress_vit.py.
"""

import logging
import os
import sys

from launched import say_error
from transformers.utils import logging as of_transformers

from comcat_hf.errors import ComCATError
from comcat_hf.training.classify.evaluation_report import evaluate_models, parse_evaluate_settings


def main(arguments: list[str]) -> int:
    """Evaluate what the arguments name; returns the exit code."""
    main_process = int(os.environ.get("RANK", "0")) == 0
    if not main_process:
        of_transformers.disable_progress_bar()
        logging.getLogger("comcat_hf").setLevel(logging.ERROR)

    def say(text: str) -> None:
        if main_process:
            print(text, file=sys.stderr, flush=True)

    try:
        result = evaluate_models(parse_evaluate_settings(arguments), report=say)
    except ComCATError as error:
        if main_process:
            say_error(error)
        return 2
    if main_process:
        print(result.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
