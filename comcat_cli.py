"""The program `comcat`, which answers what needs no model without importing torch, as `import comcat_hf` does."""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Entry point of `comcat`: a command that needs models runs `comcat_hf/__init__.py` itself (cli/shell.py)."""
    sys.modules.setdefault("comcat_hf", module_from_spec(find_spec("comcat_hf")))
    from comcat_hf.cli import main as run

    run()


if __name__ == "__main__":
    main()
