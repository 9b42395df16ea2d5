"""Train a ComCAT adapter on images of a subject, DreamBooth style.

    accelerate launch scripts/customize_diffusion.py sd15_dreambooth \
        --instance_data_dir photos --instance_prompt "a photo of sks dog" --output_dir dog-adapter

`--help` lists the flags, which are named as in diffusers' DreamBooth scripts.
"""

import logging
import os
import sys

from launched import say_error

from comcat_hf.errors import ComCATError
from comcat_hf.training.dreambooth.loop import customize
from comcat_hf.training.dreambooth.settings import parse_customize_settings


def main(arguments: list[str]) -> int:
    """Run the training that the arguments describe; returns the exit code."""
    main_process = int(os.environ.get("RANK", "0")) == 0
    if not main_process:
        _be_quiet()

    def say(text: str) -> None:
        if main_process:
            print(text, file=sys.stderr, flush=True)

    try:
        result = customize(parse_customize_settings(arguments), report=say)
    except ComCATError as error:
        if main_process:
            say_error(error)
        return 2
    if result.interrupted is not None:
        done = f" after step {result.step} of {result.plan.steps}" if result.plan else ""
        place = f" and saved in {result.checkpoint}" if result.checkpoint else ""
        say(f"Stopped by {result.interrupted}{done}{place}. Go on with --resume_from_checkpoint latest.")
    elif not result.plan.settings.dry_run:
        say(f"The adapter is in {result.output_dir}" + (f", and at {result.commit}" if result.commit else "") + ".")
    return 0


def _be_quiet() -> None:
    """Leave bars and warnings to the main process."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    logging.getLogger("comcat_hf").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
