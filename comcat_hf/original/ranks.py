"""Reads and writes `ranks.txt` of the original release: one line of ranks in a fixed order."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configs import RankPlan
from ..errors import CheckpointError, RankPlanError, brief
from ..hub import write_text_atomic


__all__ = ["read_original_ranks", "write_original_ranks"]

# More digits than any model needs; Python itself refuses to read numbers of thousands of digits.
_RANK = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_PLACES = ("QK", "VO", "fc1", "fc2")


def read_original_ranks(path: str | Path, layers: int) -> list[int]:
    """Read the ranks of a `ranks.txt`.

    Args:
        path: the file.
        layers: number of blocks of the model.

    Returns:
        `4 · layers + 1` ranks: for each block QK and VO, each summed over all heads, then fc1 and fc2; at the end the
        classifier's.

    Raises:
        CheckpointError: a missing file, an entry that is not a number, or a wrong number of entries.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: expected a readable line of ranks, found none ({brief(error)}); check the path"
        ) from error
    ranks = []
    for position, word in enumerate(text.strip().strip(",").split(",")):
        word = word.strip()
        if not _RANK.fullmatch(word):
            raise CheckpointError(
                f"{path}: expected positive whole numbers with commas between, found {word[:20]!r} at position "
                f"{position}; download the file again"
            )
        ranks.append(int(word))
    if len(ranks) != 4 * layers + 1:
        raise CheckpointError(
            f"{path}: expected {4 * layers + 1} ranks for {layers} blocks ({', '.join(_PLACES)} of each, and the "
            f"head), found {len(ranks)}; the file belongs to another model"
        )
    return ranks


def write_original_ranks(plan: RankPlan, path: str | Path, *, heads: int) -> Path:
    """Write a plan as a `ranks.txt`.

    Args:
        plan: plan of a ViTForImageClassification or a DeiTForImageClassificationWithTeacher, with ranks for attention,
            fc1 and fc2 of every block and for the classifier.
        path: file to write.
        heads: attention heads of a block; the file holds the sum of their ranks.

    Returns:
        the path.

    Raises:
        RankPlanError: a plan that the format cannot hold: a layer that stays dense, an MLP with a width.
    """
    distilled = any(name.startswith("deit.") for name in plan.ranks)
    prefix, head = ("deit", "cls_classifier") if distilled else ("vit", "classifier")
    layers = 0
    while any(name.startswith(f"{prefix}.layers.{layers}.") for name in plan.ranks):
        layers += 1
    ranks: list[int] = []
    for layer in range(layers):
        attention = _entry(plan, f"{prefix}.layers.{layer}.attention", ("qk", "vo"))
        ranks += [attention["qk"] * heads, attention["vo"] * heads]
        ranks += [_entry(plan, f"{prefix}.layers.{layer}.mlp.{name}")["rank"] for name in ("fc1", "fc2")]
    ranks.append(_entry(plan, head)["rank"])
    if len(plan.ranks.keys() - {"distillation_classifier"}) != 3 * layers + 1:
        raise RankPlanError(
            f"expected a plan of {prefix}.layers.N.attention, .mlp.fc1, .mlp.fc2 and {head}, found others among "
            f"{', '.join(sorted(plan.ranks))}; the original format has no place for them"
        )
    return write_text_atomic(path, ",".join(map(str, ranks)) + "\n")


def _entry(plan: RankPlan, name: str, keys: Sequence[str] = ("rank",)) -> dict[str, Any]:
    entry = plan.ranks.get(name)
    found = {"rank": entry} if isinstance(entry, int) else dict(entry or {})
    if set(found) != set(keys):
        raise RankPlanError(
            f"{name}: expected {' and '.join(keys)}, found {'no entry' if entry is None else entry}; "
            "the original format holds a rank for every layer, and neither dense layers nor widths"
        )
    return found
