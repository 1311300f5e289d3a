"""A checkpoint's directory behind ``vllm serve``: greedy continuations, with the log-probabilities of all tokens.

The server listens on 127.0.0.1 only, on a free port, and is ended, with all its processes, at the end of the ``with``.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LONGEST = 256
START_SECONDS = 600
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # On CPUs with AMX vLLM would round the activations of W4A16 to 8 bits: the model is to be computed as it is stored.
    "VLLM_CPU_INT4_W4A8": "0",
    # Its threads stay on the cores that the tests were given.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "HF_HUB_OFFLINE": "1",
}


class RefusedError(RuntimeError):
    """The server did not come up; the message is its own."""


@dataclass(frozen=True)
class Continuation:
    """What a server made of a prompt.

    Attributes:
        tokens: the ids of the new tokens.
        log_probabilities: of the prompt's tokens but for the first, and of the new ones, each given those before it.
    """

    tokens: list[int]
    log_probabilities: list[float]


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        address: of its OpenAI-compatible API.
        log: what it printed while it started.
    """

    address: str
    log: str

    def continuations(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        """The greedy continuation of each prompt by so many tokens; an end-of-text token does not end it."""
        options = {"ignore_eos": True, "return_token_ids": True, "logprobs": 0, "prompt_logprobs": 0}
        found = []
        for prompt, choice in zip(prompts, self._complete(prompts, max_tokens=tokens, **options), strict=True):
            places = choice["prompt_logprobs"]
            of_prompt = [places[i][str(token)]["logprob"] for i, token in enumerate(prompt) if i]
            found.append(Continuation(choice["token_ids"], of_prompt + choice["logprobs"]["token_logprobs"]))
        return found

    def _complete(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[dict[str, Any]]:
        body = {"model": "model", "prompt": [list(ids) for ids in prompts], "temperature": 0, **options}
        request = urllib.request.Request(  # noqa: S310
            f"{self.address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:  # noqa: S310
            choices: list[dict[str, Any]] = json.load(answer)["choices"]
        return sorted(choices, key=lambda choice: choice["index"])


@contextmanager
def serve(folder: Path, dtype: torch.dtype, *options: str) -> Iterator[Server]:
    """A server for the checkpoint in ``folder``, computing in ``dtype``.

    Raises:
        RefusedError: it ended before it answered.
    """
    port = _free_port()
    command = [*_program(), str(folder), "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", str(dtype).removeprefix("torch."), "--enforce-eager"]
    command += ["--max-model-len", str(LONGEST), "--max-num-seqs", "8", "--no-enable-prefix-caching", *options]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=out, start_new_session=True
            )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, address, log)
            yield Server(address, log.read_text(errors="replace"))
        finally:
            _end(process)


def _program() -> list[str]:
    """``vllm serve``, which in the package vllm-cpu 0.32.0 stops because it looks for one of the name vllm."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RefusedError(_reason(log.read_text(errors="replace")))
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{address}/health", timeout=5):  # noqa: S310
            return
        time.sleep(0.5)
    raise TimeoutError(f"no answer within {START_SECONDS} s: {log.read_text(errors='replace')[-2000:]}")


def _reason(log: str) -> str:
    """The first error that its log names, to the end of the sentence."""
    found = re.search(r"(?:^|\s)(\w+(?:Error|Exception): .*(?:\n.*)?)", log)
    return found[1] if found else log[-2000:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """It has a session of its own, so that its engine ends with it."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    process.wait()
