"""A Python process with the real Hub client, which asks a server given by HF_ENDPOINT.

huggingface_hub reads its settings when it is imported, so tests cannot change them in their own process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent.parent
# Runs one text of code after the other; the last expression's value is what a text gives back. Waits between attempts
# are cut short.
_LOOP = """
import ast, json, sys, time
answers = sys.stdout
sys.stdout = sys.stderr
import comcat_hf
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
names = {"comcat_hf": comcat_hf}
for line in sys.stdin:
    tree = ast.parse(json.loads(line))
    try:
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "test", "exec"), names)
        value = None if last is None else eval(compile(last, "test", "eval"), names)
        answer = {"value": value}
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error)}
    print(json.dumps(answer, default=str), file=answers, flush=True)
"""


class ClientError(Exception):
    """What the code in the other process raised."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """The variables of a user of that endpoint, with a cache of their own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    given = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return kept | given | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_good"}


class Client:
    """A process that runs code: `client("1 + 1")` is 2."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.errors = home / "stderr.txt"
        home.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            env=environment(endpoint, home),
        )

    def __call__(self, code: str) -> Any:
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The client ended:\n{self.errors.read_text()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], answer["text"])
        return answer["value"]

    def close(self) -> None:
        self._process.stdin.close()
        # It has nothing left to do, and takes seconds to unload its libraries.
        self._process.kill()
        self._process.wait(timeout=60)
        self._process.stdout.close()
