"""A Space with the page of `comcat app`. The Space's variable `COMCAT_APP` holds the options of the command."""

import os
import shlex

from comcat_hf.cli import app


if __name__ == "__main__":
    options = shlex.split(os.environ.get("COMCAT_APP", ""))
    app(["app", "--host", "0.0.0.0", *options], prog_name="comcat")
