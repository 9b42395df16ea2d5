"""The errors this package raises on purpose.

Every message names the module path or file, what was expected, what was found and the fix.
"""

_BRIEF = 500


def brief(error: BaseException) -> str:
    """The text of a library's error for a message of ours: one line, without the C++ frames that torch adds."""
    text = " ".join(str(error).partition("\nException raised from")[0].split())
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}…"


class ComCATError(Exception):
    """Base of every error that `comcat_hf` raises on purpose."""


class InvalidValueError(ComCATError, ValueError):
    """An argument, option or configuration field has a value that cannot be used."""


class UnsupportedModuleError(ComCATError, ValueError):
    """An attention or linear module that no handler knows.

    The message names its path, its class, why it is refused and the list of known ones.
    """


class RankPlanError(InvalidValueError):
    """A rank file or plan that does not fit: bad file, other architecture or unknown module."""


class CheckpointError(ComCATError, ValueError):
    """A checkpoint that cannot be found or read, or whose factors are missing or of other shapes."""


class BudgetError(InvalidValueError):
    """A reduction that no choice of ranks within the given limits can reach."""
