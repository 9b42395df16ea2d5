"""Settings of the app, preloading of models, and the server."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ComCATError, InvalidValueError, brief
from .classifiers import Pair, load_pair
from .interface import CSS, build_app, import_gradio
from .pipelines import Studio


__all__ = ["AppSettings", "preload", "run_app", "start_app"]


@dataclass(frozen=True)
class AppSettings:
    """Settings of the app: models to load first, and the address of the server.

    Attributes:
        pipeline: folder or Hub id of a pipeline to load first.
        adapters: folders or Hub ids of its adapters, by name.
        dense, compressed: folders or Hub ids of classifiers to load first.
        host: address to listen on; only this machine can reach the default.
        port: port to listen on; `None` for a free port.
        share: also open a public address through gradio's servers.
    """

    pipeline: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    dense: str | None = None
    compressed: str | None = None
    host: str = "127.0.0.1"
    port: int | None = 7860
    share: bool = False


def preload(settings: AppSettings) -> tuple[Studio, Pair | None]:
    """Load the models in the settings.

    Args:
        settings: names the models.

    Returns:
        a studio, empty without a pipeline in the settings, and a pair of classifiers, if the settings name one.

    Raises:
        InvalidValueError: adapters without a pipeline, a dense model without a compressed one, or an adapter that does
            not belong to the pipeline.
        CheckpointError: a model or an adapter that does not load.
    """
    if settings.adapters and not settings.pipeline:
        raise InvalidValueError(
            f"{', '.join(settings.adapters)}: expected a pipeline to put adapters into, found none; "
            "give --pipeline too."
        )
    if settings.dense and not settings.compressed:
        raise InvalidValueError(
            f"{settings.dense}: expected a compressed model beside the dense one, found none; give --compressed too."
        )
    studio, pair = Studio(), None
    if settings.pipeline:
        studio.load(settings.pipeline)
    for name, source in settings.adapters.items():
        studio.add(name, source)
    if settings.compressed:
        pair = load_pair(settings.dense or "", settings.compressed)
    return studio, pair


def start_app(settings: AppSettings) -> tuple[Any, str]:
    """Load models, build the page and start the server in its own threads.

    Args:
        settings: models to load, and the server's address.

    Returns:
        the running gradio Blocks (`close()` stops them) and the addresses, as one text.

    Raises:
        ComCATError: gradio is missing, a model does not load, or the server cannot listen or be shared.
    """
    gr = import_gradio()
    blocks = build_app(*preload(settings))
    system = ("system-ui", "sans-serif")
    theme = gr.themes.Default(font=system, font_mono=("ui-monospace", "monospace"))
    try:
        _, local, public = blocks.launch(
            server_name=settings.host,
            server_port=settings.port,
            share=settings.share,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
            css=CSS,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
        )
    except (OSError, ValueError) as error:
        blocks.close()
        raise ComCATError(
            f"{settings.host}:{settings.port}: expected an address to listen on, found one that cannot be used "
            f"({brief(error)}). Give another --host or --port."
        ) from error
    if settings.share and not public:
        blocks.close()
        raise ComCATError(
            "--share: expected a public address from gradio's servers, found none; check the network, or leave it out."
        )
    return blocks, f"{local} and, for everyone, {public}" if public else local


def run_app(settings: AppSettings, report: Callable[[str], None] = lambda text: None) -> None:
    """Serve the app until interrupted.

    Args:
        settings: models to load, and the server's address.
        report: called with the address.

    Raises:
        ComCATError: as [`start_app`].
    """
    blocks, address = start_app(settings)
    report(address)
    blocks.block_thread()
