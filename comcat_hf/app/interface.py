"""The app's page: two gradio tabs that call the other modules."""

import functools
import html
import json
from collections.abc import Callable
from typing import Any

from ..errors import ComCATError, InvalidValueError
from .classifiers import MOST_REPEATS, Answer, Pair, classify, load_pair
from .pipelines import LARGEST, DrawSettings, Studio


__all__ = ["CSS", "build_app", "import_gradio"]

# Events that work on the same kind of model run one after another, whoever asks.
_DRAWING, _CLASSIFYING = "comcat_drawing", "comcat_classifying"
_HOUR, _DAY = 3600, 86400
_TOAST = 20  # seconds

CSS = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: 0 auto !important}
.status {overflow-wrap: anywhere; min-height: 2em}
.status .error, .status .clear-status {display: none}
.remove {align-self: center}
.shown img {width: 100%; height: 100%; object-fit: contain}
"""


def import_gradio() -> Any:
    """Import gradio when it is needed.

    Raises:
        ComCATError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ComCATError(
            "The app needs gradio, which is not installed. Install what it needs with: pip install 'comcat_hf[app]'"
        ) from error
    return gradio


def build_app(studio: Studio | None = None, pair: Pair | None = None) -> Any:
    """Build the page.

    Args:
        studio: pipeline with adapters that every visitor starts with.
        pair: classifiers that every visitor starts with.

    Returns:
        gradio Blocks, not launched.

    Raises:
        ComCATError: gradio is not installed.
    """
    gr = import_gradio()
    studio = studio or Studio()
    with gr.Blocks(title="comcat_hf", analytics_enabled=False, fill_width=True, delete_cache=(_HOUR, _DAY)) as blocks:
        gr.Markdown(
            "# comcat_hf\nLow-rank adapters of a pipeline, and a compressed classifier, beside what they were made of."
        )
        with gr.Tab("Customize"):
            _customize(gr, blocks, studio)
        with gr.Tab("Compress"):
            _compress(gr, pair)
    return blocks.queue(default_concurrency_limit=1)


def _customize(gr: Any, blocks: Any, first: Studio) -> None:
    """The tab with a pipeline and its adapters."""
    studio, names = gr.State(first), gr.State(first.adapters)
    height, width = first.native_size()
    # Sliders come and go with the adapters; their values are gathered here, in the browser.
    scales = gr.JSON({}, visible=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            source = gr.Textbox(
                first.source, label="Pipeline", info="Folder or Hub id", placeholder="user/pipeline", max_lines=1
            )
            load = gr.Button("Load the pipeline")
            about = gr.Markdown(first.describe(), elem_classes="status")
            with gr.Group():
                adapter = gr.Textbox(label="Adapter", info="Folder or Hub id", placeholder="user/adapter", max_lines=1)
                name = gr.Textbox(label="Name", info="Empty: the last word of the above", max_lines=1)
            add = gr.Button("Add the adapter")
            rows = gr.Column()
        with gr.Column(scale=3, min_width=400):
            prompt = gr.Textbox(label="Prompt", lines=2)
            look = {"label": "Prompts of the adapters' cards", "components": ["textbox"]}
            examples = gr.Dataset(**look, **_examples(first))
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
                steps = gr.Slider(1, 150, 30, step=1, label="Steps", min_width=140)
                guidance = gr.Slider(0, 20, 7.5, step=0.5, label="Guidance", min_width=140)
            with gr.Row():
                across = gr.Slider(8, LARGEST, width, step=8, label="Width", min_width=140)
                down = gr.Slider(8, LARGEST, height, step=8, label="Height", min_width=140)
            draw = gr.Button("Draw", variant="primary")
            with gr.Row():
                shown = {"type": "pil", "format": "png", "interactive": False, "elem_classes": "shown"}
                # The button that is left out uploads.
                shown |= {"min_width": 180, "height": 360, "buttons": ["download", "fullscreen"]}
                before = gr.Image(label="Before: without adapters", **shown)
                after = gr.Image(label="After: with adapters", **shown)
            took = gr.Markdown()

    examples.click(lambda chosen: chosen[0], examples, prompt, api_visibility="private")
    gr.on(names.change, lambda of: gr.Dataset(**_examples(of)), studio, examples, api_visibility="private")
    with rows:
        _adapter_rows(gr, blocks, (studio, names, scales), about)
    event = functools.partial(_listen, gr, _DRAWING)
    opened = (_open_pipeline, [studio, source], [studio, names, scales, about, across, down])
    event([load.click, source.submit], *opened, "load_pipeline", about)
    added = (_add_adapter, [studio, name, adapter], [studio, names, name, adapter])
    event([add.click, adapter.submit, name.submit], *added, "add_adapter", about)
    inputs = [studio, scales, prompt, seed, steps, guidance, across, down]
    event([draw.click, prompt.submit], _drawer(gr), inputs, [before, after, took], "draw", [before, after])


def _adapter_rows(gr: Any, blocks: Any, parts: tuple[Any, Any, Any], about: Any) -> None:
    """A slider and a button for each adapter, drawn again whenever an adapter is added or removed."""
    studio, names, scales = parts

    @gr.render(inputs=[names, scales], triggers=[blocks.load, names.change], concurrency_limit=None)
    def rows(present: tuple[str, ...], known: dict[str, float] | None) -> None:
        for name in present:
            with gr.Row():
                look = {"label": name, "step": 0.05, "scale": 4, "min_width": 180, "interactive": True}
                slider = gr.Slider(0, 2, (known or {}).get(name, 1.0), **look)
                remove = gr.Button("Remove", scale=1, min_width=90, size="sm", elem_classes="remove")
            keep = f"(scales, value) => ({{...scales, [{json.dumps(name)}]: value}})"
            slider.change(None, [scales, slider], [scales], js=keep, queue=False)
            taken = functools.partial(_remove_adapter, name)
            _listen(gr, _DRAWING, [remove.click], taken, [studio, scales], [studio, names, scales], None, about)


def _compress(gr: Any, first: Pair | None) -> None:
    """The tab with two classifiers."""
    pair = gr.State(first)
    with gr.Row():
        known = (first.dense.source, first.compressed.source) if first else ("", "")
        field = {"max_lines": 1, "min_width": 300}
        info = "Folder or Hub id; empty: the compressed model's base"
        dense = gr.Textbox(known[0], label="Dense model", info=info, **field)
        compressed = gr.Textbox(known[1], label="Compressed model", info="Folder or Hub id", **field)
    load = gr.Button("Load both")
    about = gr.Markdown(_loaded(first), elem_classes="status")
    look = {"label": "Reduction: the share removed", "step": 0.01, "interactive": True}
    reduction = gr.Slider(**look, **_range(first))
    with gr.Row():
        with gr.Column(min_width=260):
            look = {"sources": ["upload", "clipboard"], "height": 320, "elem_classes": "shown"}
            image = gr.Image(label="Image", **look)
            # The file as it was uploaded: gradio would open it, and cut off what exceeds 8 bits.
            image.preprocess = lambda payload: payload and payload.path
            repeats = gr.Slider(1, MOST_REPEATS, 10, step=1, label="Timed runs of each model")
            again = gr.Button("Classify", variant="primary")
        with gr.Column(scale=2, min_width=440):
            with gr.Row():
                answers = [
                    gr.Label(label=label, num_top_classes=5, min_width=200) for label in ("Dense", "Compressed")
                ]
            sizes = gr.Markdown()
    event = functools.partial(_listen, gr, _CLASSIFYING)
    opened = (functools.partial(_open_pair, gr), [dense, compressed], [pair, about, reduction])
    event([load.click, dense.submit, compressed.submit], *opened, "load_classifiers", about)
    event([image.upload, again.click], _classify, [pair, image, repeats], [*answers, sizes], "classify", answers)
    resize = functools.partial(_resize, gr)
    resized = (resize, [pair, reduction, image, repeats], [pair, about, *answers, sizes])
    event([reduction.release], *resized, "set_reduction", about)


def _listen(
    gr: Any,
    group: str,
    triggers: list[Any],
    call: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    name: str | None,
    progress_on: Any = None,
) -> None:
    """Run `call` on `triggers`, one at a time per group; a ComCATError becomes a message on the page."""

    @functools.wraps(call)
    def told(*values: Any) -> Any:
        try:
            return call(*values)
        except ComCATError as error:
            # The page would read the message as HTML.
            text = html.escape(str(error), quote=False)
            raise gr.Error(text, duration=_TOAST, print_exception=False) from None

    gr.on(
        triggers,
        told,
        inputs,
        outputs,
        api_name=name,
        api_description=False,
        api_visibility="public" if name else "private",
        show_progress_on=progress_on,
        concurrency_limit=1,
        concurrency_id=group,
    )


def _examples(studio: Studio) -> dict[str, Any]:
    """The prompts that are offered; nothing is shown without any."""
    return {"samples": [[prompt] for prompt in studio.prompts], "visible": bool(studio.prompts)}


def _open_pipeline(studio: Studio, source: str) -> tuple[Any, ...]:
    studio.load(source)
    height, width = studio.native_size()
    return studio, studio.adapters, {}, studio.describe(), width, height


def _add_adapter(studio: Studio, name: str, source: str) -> tuple[Any, ...]:
    studio.add(name or "", source)
    return studio, studio.adapters, "", ""


def _remove_adapter(name: str, studio: Studio, scales: dict[str, float] | None) -> tuple[Any, ...]:
    studio.remove(name)
    return studio, studio.adapters, {other: scale for other, scale in (scales or {}).items() if other != name}


def _drawer(gr: Any) -> Callable[..., tuple[Any, Any, str]]:
    def draw(
        studio: Studio,
        scales: dict[str, float] | None,
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        width: int,
        height: int,
        # gradio shows progress of functions that have such an argument.
        progress: Callable[[float], Any] = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, Any, str]:
        settings = DrawSettings(prompt or "", seed, steps, guidance, height, width)
        drawing = studio.draw(settings, scales, report=progress)
        text = f"Seed {seed}: {drawing.seconds_before:.2f} s before, {drawing.seconds_after:.2f} s after."
        if drawing.blackened:
            text += " The pipeline's safety checker replaced an image."
        return drawing.before, drawing.after, text

    return draw


def _range(pair: Pair | None) -> dict[str, Any]:
    """The ends of the reductions and the present one; hidden where the compressed model has a fixed size."""
    if pair is None or pair.elastic is None:
        return {"minimum": 0, "maximum": 1, "value": 0, "visible": False}
    return {"minimum": pair.elastic.low, "maximum": pair.elastic.high, "value": pair.reduction, "visible": True}


def _open_pair(gr: Any, dense: str, compressed: str) -> tuple[Any, ...]:
    pair = load_pair(dense, compressed)
    return pair, _loaded(pair), gr.Slider(**_range(pair))


def _resize(gr: Any, pair: Pair | None, reduction: float, image: Any, repeats: int) -> tuple[Any, ...]:
    if pair is None:
        raise InvalidValueError("Expected an elastic model, found none; load one first.")
    pair = pair.with_reduction(reduction)
    shown = (gr.skip(), gr.skip(), gr.skip()) if image is None else _classify(pair, image, repeats)
    return pair, _loaded(pair), *shown


def _classify(pair: Pair | None, image: Any, repeats: int) -> tuple[Any, ...]:
    answers = classify(pair, image, repeats)
    return *(dict(answer.labels) for answer in answers), _table(pair, answers)


def _loaded(pair: Pair | None) -> str:
    if pair is None:
        return "No models are loaded."
    removed = 1 - pair.compressed.parameters / pair.dense.parameters
    return f"{type(pair.dense.model).__name__}, {removed:.1%} of its parameters removed."


def _table(pair: Pair, answers: tuple[Answer, Answer]) -> str:
    """Sizes and times in Markdown."""
    sides = (pair.dense, pair.compressed)
    rows: dict[str, tuple[list[Any], Callable[[Any], str]]] = {
        "latency": ([answer.latency for answer in answers], lambda seconds: f"{seconds * 1e3:.2f} ms"),
        "parameters": ([side.parameters for side in sides], lambda count: f"{count:,}"),
        "MACs": ([side.macs for side in sides], lambda count: f"{count:,}"),
    }
    lines = ["| | dense | compressed | ratio |", "| --- | ---: | ---: | ---: |"]
    for name, (values, show) in rows.items():
        if None not in values:
            large, small = values
            lines.append(f"| {name} | {show(large)} | {show(small)} | {small / large:.2f} |")
    first, second = (answer.labels[0][0] for answer in answers)
    agreement = "Both say the same." if first == second else "They differ."
    return "\n".join([agreement, "", *lines])
