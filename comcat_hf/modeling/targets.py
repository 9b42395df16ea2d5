"""Which modules of a model are meant: those that `target_modules` names, less those that `exclude_modules` names."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..errors import InvalidValueError, brief
from .sites import Site
from .views import named_base_modules


__all__ = ["EVERYTHING", "Targets"]

Patterns = Collection[str] | str | None


@dataclass(frozen=True)
class Targets:
    """Modules by path, written as PEFT writes them.

    Args:
        target_modules: a list names modules by their path or its end, with everything beneath them; a string is a
            regular expression that matches a whole path. `None` is every module.
        exclude_modules: modules to leave out, written alike.
        left_out: further modules to leave out.
        paths: names that are whole paths and not the ends of others.
    """

    target_modules: Patterns = None
    exclude_modules: Patterns = None
    left_out: Patterns = None
    paths: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            _check_patterns(name, getattr(self, name))

    @classmethod
    def of(
        cls, model: nn.Module, target_modules: Patterns, exclude_modules: Patterns, left_out: Patterns = None
    ) -> "Targets":
        """Targets within a model: a name that is the path of one of its modules means that one alone."""
        targets = cls(target_modules, exclude_modules, left_out)
        if not any((target_modules, exclude_modules, left_out)):
            return targets
        return replace(targets, paths=frozenset(path for path, _, _ in named_base_modules(model)))

    def excludes(self, path: str) -> bool:
        """Whether this path is left out."""
        return any(self._match(patterns, path) for patterns in (self.exclude_modules, self.left_out) if patterns)

    def names(self, path: str) -> bool:
        """Whether `target_modules` names this path."""
        return self.target_modules is None or self._match(self.target_modules, path)

    def takes(self, path: str) -> bool:
        """Whether this path is meant."""
        return self.names(path) and not self.excludes(path)

    def takes_site(self, site: Site) -> bool:
        """Whether a site is meant: by its own path, or by those of all its modules."""
        modules = site.dense_modules()
        if site.name in modules:
            return self.takes(site.name)
        # The site of several modules: they are meant together or not at all.
        named = self.names(site.name) or all(map(self.names, modules))
        return named and not any(map(self.excludes, (site.name, *modules)))

    def roots(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the modules that `target_modules` names, without those beneath another one; excluded ones too."""
        found: list[str] = []
        for path, _, _ in named_base_modules(model):
            if path and self.names(path) and not any(path.startswith(f"{root}.") for root in found):
                found.append(path)
        return tuple(found)

    def listed(self) -> list[str] | str | None:
        """`target_modules` as a plan keeps them."""
        named = self.target_modules
        return named if named is None or isinstance(named, str) else list(named)

    def check(self, model: nn.Module) -> "Targets":
        """These targets, after a check that every pattern names a module of the model.

        Raises:
            InvalidValueError: a pattern that names none.
        """
        for name in ("target_modules", "exclude_modules"):
            patterns = getattr(self, name) or ()
            for pattern in [patterns] if isinstance(patterns, str) else [[item] for item in patterns]:
                if not any(self._match(pattern, path) for path in self.paths if path):
                    paths = [path for path, _, _ in named_base_modules(model) if path]
                    shown = pattern if isinstance(pattern, str) else pattern[0]
                    raise InvalidValueError(
                        f"{name}: {shown!r} names no module of {type(model).__name__}, whose modules are "
                        f"{', '.join(path for path in paths if path.count('.') < 2)[:400]}. Give the path of a module "
                        "or its end in a list, or a regular expression for whole paths as a string."
                    )
        return self

    def _match(self, patterns: Collection[str] | str, path: str) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, path) is not None
        found = ((f".{path}.".find(f".{pattern}."), pattern) for pattern in patterns)
        return any(place == 0 or (place > 0 and pattern not in self.paths) for place, pattern in found)

    def describe(self) -> str:
        """Words for an error."""
        excluded = f" (excluded: {self.exclude_modules})" if self.exclude_modules else ""
        return f"target modules {'all' if self.target_modules is None else self.target_modules}{excluded}"


def _check_patterns(name: str, patterns: Any) -> None:
    listed = isinstance(patterns, Collection) and all(isinstance(item, str) and item for item in patterns)
    if patterns is not None and not listed:
        raise InvalidValueError(
            f"{name} must be a list of module paths, or a regular expression as a string, got {patterns!r}."
        )
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise InvalidValueError(f"{name}: {patterns!r} is no regular expression ({brief(error)}).") from error


EVERYTHING = Targets()
