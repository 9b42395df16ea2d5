"""The quality benchmark's own parts: its baselines, its text and its verdicts."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import comcat_hf
from tests.helpers import assert_close, full_ranks, outputs, small_bert, small_vit


# A benchmark is a script: its folder is on the path when it runs.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
baselines, cases, quality, text = map(importlib.import_module, ("_baselines", "_cases", "quality", "_text"))

MODELS = {"vit": small_vit, "bert": small_bert}
SCOPES = {scope.name: scope for scope in (cases.WHOLE, cases.ATTENTION, cases.MLP, cases.BOTH)}


def subject_of(family: str) -> tuple:
    model, inputs = MODELS[family]()
    dense = outputs(model, inputs)[0]

    def measure(small):
        return {"accuracy": (outputs(small, inputs)[0].argmax(-1) == dense.argmax(-1)).double()}

    return cases.Subject(model, [inputs], measure), inputs


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", baselines.BASELINES)
def test_baselines_remove_what_is_asked_counted_by_numel(method, scope, family):
    subject, inputs = subject_of(family)
    scope = SCOPES[scope]
    before = comcat_hf.count_parameters(subject.model)
    small = baselines.BASELINES[method](subject, scope, 0.3)
    removed = before - sum({id(p): p.numel() for p in small.parameters()}.values())
    share = removed / scope.size(subject.model)
    assert share == pytest.approx(1 - scope.size(small, subject.model) / scope.size(subject.model), abs=1e-12)
    assert 0.3 <= share <= 0.32
    assert all(tensor.isfinite().all() for tensor in outputs(small, inputs))
    assert comcat_hf.count_parameters(subject.model) == before


def test_one_sided_cannot_remove_more_than_its_half():
    subject, _ = subject_of("bert")
    with pytest.raises(baselines.OutOfReach, match=r"at most 4\d\.\d% of it can go"):
        baselines.one_sided(subject, cases.ATTENTION, 0.5)


@pytest.mark.parametrize("form", ["weights", "plain", "centred"])
@pytest.mark.parametrize("family", MODELS)
def test_per_matrix_factors_at_full_rank_are_the_original(family, form):
    subject, inputs = subject_of(family)
    layers = baselines.layers_of(subject.model, "model")
    moments = None if form == "weights" else {path: getattr(subject.inputs[path], form)() for path in layers}
    ranks = {path: min(layer.weight.shape) for path, layer in layers.items()}
    assert_close(
        outputs(baselines.with_factors(subject.model, ranks, moments), inputs), outputs(subject.model, inputs)
    )


def test_the_original_differs_from_the_dense_model_by_the_biases_alone():
    subject, inputs = subject_of("bert")
    subject.plan = lambda *args, **kwargs: comcat_hf.RankPlan(full_ranks(subject.model))
    error = (outputs(baselines.original(subject, None, 0.5), inputs)[0] - outputs(subject.model, inputs)[0]).abs()
    assert error.max() > 1e-3
    baselines.drop_biases(subject.model, full_ranks(subject.model))
    assert_close(outputs(baselines.original(subject, None, 0.5), inputs), outputs(subject.model, inputs))


def test_input_sums_are_the_moments_of_the_package():
    """Padding included; the package keeps the covariance of the inputs where they are the smaller side."""
    subject, _ = subject_of("bert")
    compared = 0
    for path, moments in subject.statistics.items():
        if getattr(moments, "side", None) == "input":
            found = subject.inputs[path].centred()
            torch.testing.assert_close(found.covariance, moments.covariance)
            torch.testing.assert_close(found.mean, moments.mean)
            compared += 1
    assert compared > 0


def test_whitening_is_best_in_the_mean_square_of_its_own_output():
    torch.manual_seed(3)
    linear = torch.nn.Linear(24, 24)
    states = torch.randn(200, 24) * torch.linspace(0.05, 2, 24) + 1
    model = torch.nn.Sequential(linear)
    sums = baselines.InputSums()
    sums.add(states, None)

    def error(moments):
        small = baselines.with_factors(model, {"0": 6}, moments and {"0": moments})
        return (small(states) - model(states)).square().mean()

    assert error(sums.centred()) < error(sums.plain()) < error(None)


def test_the_text_is_split_into_two_sides_without_near_duplicates(tmp_path, monkeypatch):
    package = tmp_path / "some_text_package"
    package.mkdir()
    names = [
        "matrix",
        "vector",
        "tensor",
        "graph",
        "forest",
        "kernel",
        "spline",
        "filter",
        "window",
        "signal",
        "cluster",
        "margin",
    ]
    lines = [f"The {name} is computed from the samples that were given to it first." for name in names]
    lines += [line.replace("first", "first, 2").upper().capitalize() for line in lines]
    marked = "The `name` of this sentence shows that it is no prose at all, but code."
    (package / "__init__.py").write_text('"""' + "\n\n".join([*lines, marked]) + '"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    calibration, held = text.split_sentences(["some_text_package"])
    forms = [text.normal_form(sentence) for sentence in (*calibration, *held)]
    assert len(set(forms)) == len(forms) == len(names)
    assert calibration and held and marked not in calibration + held
    assert (calibration, held) == text.split_sentences(["some_text_package"])
    known = [sentence.upper() for sentence in (*calibration, *held[1:])]
    assert text.further_sentences(["some_text_package"], known) == held[:1]


def test_a_case_whose_data_is_not_here_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv(cases.DATA, raising=False)
    for data, missing in ((None, "no folder"), (tmp_path, "does not exist")):
        with pytest.raises(cases.Absent, match=missing):
            cases.cifar10(argparse.Namespace(data=data, calibration=None, held_out=None))


def test_every_method_gives_a_row(monkeypatch):
    refine, steps = comcat_hf.refine, []
    # Every number of steps is asked for; one is taken.
    monkeypatch.setattr(comcat_hf, "refine", lambda *args: (steps.append(args[3]), refine(*args[:3], 1)))
    subject, _ = subject_of("vit")
    case = cases.Case({}, "accuracy", True, "", (subject, subject))
    found = list(quality.results_of("tiny", case, cases.ATTENTION, (0.4352,), list(quality.METHODS)))
    rows = json.loads(json.dumps([result.row() for result in found]))
    assert [row["method"] for row in rows] == [method for method in quality.METHODS if "MLP" not in method]
    # Of heads of 16 no equal widths with folded biases meet this budget.
    assert all(row["method"].startswith("equal widths") == ("cannot" in row) for row in rows)
    found = [result for result in found if result.cannot is None]
    assert set(steps) == set(quality.REFINED)
    assert all(0.4352 <= one.reached <= 0.455 and 0 <= one.mean("accuracy") <= 1 for one in found)
    quality.print_scope(case, found)
    quality.print_verdict(case, quality.verdict(case, found))


def test_refinement_may_learn_from_other_samples_than_calibration(monkeypatch):
    given = []
    monkeypatch.setattr(comcat_hf, "refine", lambda small, dense, batches, steps: given.append(batches))
    subject, _ = subject_of("vit")
    for learned in (None, [object()]):
        one = dataclasses.replace(subject, learned=learned)
        quality.refined(one, cases.ATTENTION, 0.4352, steps=1, start="uniform")
    assert given == [subject.batches, learned]


def test_a_tie_is_a_difference_within_one_standard_error():
    def result(method, values, cannot=None):
        samples = None if values is None else {"accuracy": torch.tensor(values, dtype=torch.float64)}
        return quality.Result("case", "model", 0.5, method, 0.0, 0.5, samples, cannot)

    strict, ties = (cases.Case({}, "accuracy", ties, "", ()) for ties in (False, True))
    better, worse = result("statistics", [1, 1, 1, 0]), result("whitened", [1, 1, 0, 0])
    assert quality.beats(better, worse, strict) and not quality.beats(better, better, strict)
    assert quality.beats(worse, better, ties)
    assert not quality.beats(result("whitened", [0, 0, 0, 0]), better, ties)
    assert quality.beats(worse, result("one-sided", None, "out of reach"), strict)
    close, closer = result("spectrum", [1, 1, 0, 0] * 20), result("whitened", [1, 1, 0, 1] + [1, 1, 0, 0] * 19)
    close.samples["accuracy"][0] = 0
    assert quality.beats(close, closer, ties) and not quality.beats(close, closer, ties, paired=True)
    said = quality.verdict(strict, [better, worse])
    assert said["holds"] and said["always"] == ["statistics"]
    assert quality.verdict(strict, [worse]) is None
