"""Measure an image classifier, compressed or dense: top-1, top-5, parameters, MACs and images per second.

    accelerate launch -m comcat_hf.training.classify.evaluate --model_name_or_path deit-small-comcat \
        --dense facebook/deit-small-patch16-224 --validation_dir imagenet/val --batch_sizes 1,32

`--help` lists the flags; those of the data are named as in the training.
"""

import sys

from ..programs import run_program
from .evaluation_report import EvaluationReport, evaluate_models, parse_evaluate_settings


def main() -> int:
    """Evaluate what the command line names; returns the exit code."""
    libraries = ("datasets", "transformers")
    return run_program(parse_evaluate_settings, evaluate_models, EvaluationReport.describe, libraries, sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
