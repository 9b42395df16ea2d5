"""The page over HTTP: what its events give, errors as messages, what is kept to this machine; and the command."""

import json
import re
import socket
import sys

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from typer.testing import CliRunner

from comcat_hf import cli
from comcat_hf.app import AppSettings, preload, start_app
from comcat_hf.app.interface import build_app
from comcat_hf.errors import ComCATError
from tests.app.test_pipelines import draw


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
NUMBERS = (3, 2, 4.0, 16, 16)  # seed, steps, guidance, width, height


@pytest.fixture(scope="module")
def server(base, adapters, classifiers):
    settings = AppSettings(
        pipeline=str(base),
        adapters={"dog": str(adapters["dog"])},
        dense=str(classifiers["dense"]),
        compressed=str(classifiers["compressed"]),
        port=None,
    )
    blocks, address = start_app(settings)
    yield address
    blocks.close()


@pytest.fixture
def client(server, tmp_path):
    """A visitor of the page, with a session of its own."""
    client = Client(server, verbose=False, analytics_enabled=False, download_files=tmp_path / "downloads")
    yield client
    client.close()


@pytest.fixture
def painted(client):
    def painted(scales=None):
        before, after, text = client.predict(scales or {}, "a cat", *NUMBERS, api_name="/draw")
        assert "Seed 3" in text
        return Image.open(before).convert("RGB"), Image.open(after).convert("RGB")

    return painted


def refused(client, *arguments, api_name):
    with pytest.raises(AppError) as caught:
        client.predict(*arguments, api_name=api_name)
    return str(caught.value)


def test_images_are_those_of_the_pipeline(base, adapters, painted):
    plain = draw(base)
    before, after = painted()
    assert (before, after) == (plain, draw(base, [adapters["dog"]], [1.0]))
    assert painted({"dog": 0}) == (plain, plain)
    assert painted({"dog": 0.5})[1] == draw(base, [adapters["dog"]], [0.5])


def test_every_visitor_has_adapters_of_its_own(server, base, adapters, client, painted, tmp_path):
    client.predict("", str(adapters["style"]), api_name="/add_adapter")
    both = draw(base, [adapters["dog"], adapters["style"]], [1.0, 1.0])
    assert painted()[1] == both
    other = Client(server, verbose=False, analytics_enabled=False, download_files=tmp_path / "others")
    _, after, _ = other.predict({}, "a cat", *NUMBERS, api_name="/draw")
    assert Image.open(after).convert("RGB") == draw(base, [adapters["dog"]], [1.0])
    *_, about, width, height = other.predict(str(base), api_name="/load_pipeline")
    assert ("StableDiffusionPipeline" in about, width, height) == (True, 16, 16)
    _, after, _ = other.predict({}, "a cat", *NUMBERS, api_name="/draw")
    assert Image.open(after).convert("RGB") == draw(base)
    other.close()
    assert painted()[1] == both


def test_errors_are_messages_and_change_nothing(adapters, classifiers, client, painted, capfd, tmp_path):
    images = painted()
    nowhere = str(tmp_path / "no<i>where")
    assert "no&lt;i&gt;where" in refused(client, nowhere, api_name="/load_pipeline")
    assert "of a pipeline" in refused(client, str(classifiers["dense"]), api_name="/load_pipeline")
    assert "name of its own" in refused(client, "dog", str(adapters["style"]), api_name="/add_adapter")
    assert "comcat_adapter.json" in refused(client, "x", str(classifiers["dense"]), api_name="/add_adapter")
    assert "cat: expected the name" in refused(client, {"cat": 1}, "a cat", *NUMBERS, api_name="/draw")
    assert "found 12" in refused(client, {}, "a cat", *NUMBERS[:4], 12, api_name="/draw")
    assert "found none; drop one" in refused(client, None, 2, api_name="/classify")
    assert "image classifier" in refused(client, nowhere, nowhere, api_name="/load_classifiers")
    assert painted() == images
    assert "Traceback" not in capfd.readouterr().err


def test_an_image_is_classified_by_both(classifiers, client, image, tmp_path):
    image.save(tmp_path / "image.png")
    dense, compressed, table = client.predict(handle_file(tmp_path / "image.png"), 2, api_name="/classify")
    for answer in (dense, compressed):
        assert {entry["label"] for entry in answer["confidences"]} == {"crane (0)", "cat", "dog", "crane (3)", "newt"}
        assert sum(entry["confidence"] for entry in answer["confidences"]) == pytest.approx(1)
    for words in ("| latency |", "| parameters |", "| MACs |", " ms |"):
        assert words in table
    about, reduction = client.predict(*map(str, classifiers.values()), api_name="/load_classifiers")
    assert "of its parameters removed" in about and not reduction["visible"]


def test_an_elastic_model_gets_another_reduction(client, elastic, image, tmp_path):
    image.save(tmp_path / "image.png")
    _, reduction = client.predict("", str(elastic), api_name="/load_classifiers")
    known = {name: reduction[name] for name in ("visible", "minimum", "maximum", "value")}
    assert known == {"visible": True, "minimum": 0.2, "maximum": 0.6, "value": 0.4}
    about, dense, compressed, table = client.predict(
        0.6, handle_file(tmp_path / "image.png"), 1, api_name="/set_reduction"
    )
    assert re.search(r"60\.[0-5]% of its parameters removed", about)
    assert dense["confidences"] != compressed["confidences"] and "| parameters |" in table
    assert "maximum value 0.6" in refused(client, 0.9, None, 1, api_name="/set_reduction")


def test_images_reach_the_classifiers_as_they_were_uploaded(client, tmp_path):
    grey = Image.linear_gradient("L").resize((32, 32))
    grey.save(tmp_path / "8.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "16.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "8.png").read_bytes()[:60])
    (tmp_path / "none.png").write_bytes(b"no image")
    one, other = (
        client.predict(handle_file(tmp_path / name), 1, api_name="/classify")[0] for name in ("8.png", "16.png")
    )
    assert one == other
    for name in ("broken.png", "none.png"):
        said = refused(client, handle_file(tmp_path / name), 1, api_name="/classify")
        assert said.startswith("The image: expected an image, found one that cannot be read")


def test_a_row_comes_and_goes_with_each_adapter(server):
    """As the page does it: the rows are asked for, and a row's button is pressed."""
    session = "rows"
    config = httpx.get(f"{server}config").json()
    rows = next(d["id"] for d in config["dependencies"] if d["rendered_in"] is None and "load" in str(d["targets"]))
    shown = press(server, session, rows, [None, {"dog": 0.5}])["render_config"]
    (slider,) = (c["props"] for c in shown["components"] if c["type"] == "slider")
    assert (slider["label"], slider["value"], slider["maximum"]) == ("dog", 0.5, 2)
    keep, remove = sorted(shown["dependencies"], key=lambda event: event["backend_fn"])
    assert "dog" in keep["js"]
    assert press(server, session, remove["id"], [None, {"dog": 0.5}])["data"][-1] == {}
    shown = press(server, session, rows, [None, {}])["render_config"]
    assert [c["type"] for c in shown["components"] if c["type"] in ("slider", "button")] == []


def press(server, session, event, data):
    """What an event of a session gives."""
    body = {"data": data, "fn_index": event, "session_hash": session}
    httpx.post(f"{server}gradio_api/queue/join", json=body).raise_for_status()
    with httpx.stream("GET", f"{server}gradio_api/queue/data", params={"session_hash": session}, timeout=30) as answer:
        for line in answer.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                assert message["success"], message
                return message["output"]
    raise AssertionError("no answer")


def test_the_server_is_for_this_machine_and_asks_no_other(server):
    assert server.startswith("http://127.0.0.1:")
    assert not build_app().analytics_enabled
    style = httpx.get(f"{server}theme.css").text
    assert "system-ui" in style
    assert "//fonts." not in style


def test_events_of_one_kind_of_model_wait_for_each_other():
    groups = {fn.api_name: (fn.concurrency_id, fn.concurrency_limit) for fn in build_app().fns.values()}
    assert groups["draw"] == groups["load_pipeline"] == groups["add_adapter"] == ("comcat_drawing", 1)
    assert groups["classify"] == groups["load_classifiers"] == ("comcat_classifying", 1)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["app", *map(str, arguments)])


def test_the_command_says_what_it_takes():
    result = CliRunner().invoke(cli.app, ["app", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in ("--pipeline", "--adapter", "--dense", "--compressed", "--host", "--port", "--share"):
        assert option in result.stdout
    assert "127.0.0.1" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter", "dog"), "--adapter: expected NAME=FOLDER_OR_ID, found 'dog'"),
        (("--adapter", "dog=a", "--adapter", "dog=b"), "names that differ"),
        (("--adapter", "dog=a"), "give --pipeline too"),
        (("--dense", "a"), "give --compressed too"),
        (("--pipeline", "/no/such/folder"), "of a pipeline"),
        (("--compressed", "/no/such/folder"), "compressed model /no/such/folder: expected"),
    ],
)
def test_the_command_refuses_before_it_serves(arguments, message, monkeypatch):
    monkeypatch.setattr("gradio.Blocks.launch", lambda *a, **k: pytest.fail("launched"))
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("comcat app: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_port_in_use_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "expected an address to listen on" in result.stderr


def test_the_command_serves_until_it_is_stopped(monkeypatch):
    asked = []
    monkeypatch.setattr("comcat_hf.app.run_app", lambda settings, report: (asked.append(settings), report("here")))
    result = run(
        "--pipeline", "p", "--adapter", "dog=user/dog", "--adapter", "x=a=b", "--host", "0.0.0.0", "--port", 1
    )
    assert (result.exit_code, result.stdout) == (0, "Running on here\nPress Ctrl+C to stop.\n")
    assert asked == [AppSettings("p", {"dog": "user/dog", "x": "a=b"}, host="0.0.0.0", port=1)]
    run()
    assert asked[1] == AppSettings()


def test_sharing_is_asked_for(monkeypatch):
    launched = []

    def launch(self, **options):
        launched.append(options)
        return None, "http://127.0.0.1:1/", None

    monkeypatch.setattr("gradio.Blocks.launch", launch)
    start_app(AppSettings())
    with pytest.raises(ComCATError, match="--share: expected a public address"):
        start_app(AppSettings(share=True))
    assert [options["share"] for options in launched] == [False, True]
    assert launched[0]["server_name"] == "127.0.0.1"


def test_gradio_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run()
    assert result.exit_code == 1
    assert result.stderr == (
        "comcat app: The app needs gradio, which is not installed. Install what it needs with: "
        "pip install 'comcat_hf[app]'\n"
    )


def test_without_models_the_page_is_empty():
    studio, pair = preload(AppSettings())
    assert (studio.source, pair) == ("", None)
    build_app(studio, pair)
