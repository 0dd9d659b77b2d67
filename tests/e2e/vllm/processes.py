"""vLLM in processes of its own: scripts, and servers that are asked over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.servers import free_port, program

ROOT = Path(__file__).parents[3]
LEASH = Path(__file__).parent / "leash.py"
PATIENCE = 400.0
"""Seconds that an engine may take to start, to answer and to end: 20 s where nothing else runs."""


def environment(folder: Path, **more: str) -> dict[str, str]:
    """That of a user who has set nothing but `more`; vLLM runs in several processes, uncompiled."""
    ours = {name: text for name, text in os.environ.items() if not name.startswith("LMCACHE_")}
    ours.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    paths = [ROOT, *(ROOT / part for part in ("backends", "serde", "connectors")), folder]
    _make_known(folder)
    # A tenth of what vLLM takes to import goes into collecting garbage of which there is none.
    (folder / "sitecustomize.py").write_text("import gc\ngc.set_threshold(100_000)\n")
    return {
        **ours,
        "PYTHONPATH": os.pathsep.join([ours.get("PYTHONPATH", ""), *map(str, paths)]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_USE_AOT_COMPILE": "0",
        "TORCHDYNAMO_DISABLE": "1",
        # Shorter than the 5 s after which vLLM kills an engine core that waits for its workers;
        # killed ones leave shared memory behind.
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "2",
        **more,
    }


def _make_known(folder: Path) -> None:
    """`vllm serve` asks for the version of the distribution vllm; the CPU's may be vllm-cpu."""
    with contextlib.suppress(PackageNotFoundError):
        version("vllm")
        return
    cpu = f"{version('vllm-cpu')}+cpu"
    info = folder / f"vllm-{cpu}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu}\n")


class Process:
    """A command on a leash. What it says goes into files of `folder`."""

    def __init__(self, folder: Path, command: list[str], env: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = folder / "stdout", folder / "stderr"
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self._leash = subprocess.Popen(
                [sys.executable, str(LEASH), *command],
                stdin=subprocess.PIPE, stdout=out, stderr=err, env=env, start_new_session=True,
            )  # fmt: skip

    @property
    def out(self) -> str:
        return self._files[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._files[1].read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self._leash.poll() is not None

    def wait(self) -> int:
        """Its exit status."""
        return self._leash.wait(PATIENCE)

    def terminate(self) -> None:
        """SIGTERM, to the command and to none of its children."""
        self._leash.terminate()

    def running(self) -> list[str]:
        """Everything of it that runs."""
        names: list[str] = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                dead = process.status() == psutil.STATUS_ZOMBIE  # whom init does not care for
                if os.getpgid(process.pid) == self._leash.pid and not dead:
                    names.append(f"{process.pid} {process.name()}")
        return names

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._leash.pid, signal.SIGKILL)
        self._leash.stdin.close()
        self._leash.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run(folder: Path, script: str, *arguments: str, env: dict[str, str]) -> Process:
    """A Python script that has ended. It needs no `if __name__`: no file is imported again."""
    with Process(folder, [sys.executable, "-c", script, *arguments], env) as process:
        process.wait()
    return process


def said(process: Process) -> Any:
    """What a script printed behind "said:", as JSON."""
    lines = [line for line in process.out.splitlines() if line.startswith("said:")]
    assert lines, process.out[-3000:] + process.err[-3000:]
    return json.loads(lines[-1].removeprefix("said:"))


class Instance(Process):
    """`vllm serve`, for token ids: a server and an engine core, whose worker is in its process, as
    it is on one GPU. On the CPU vLLM gives the worker one of its own unless this variable is set.
    """

    def __init__(
        self, folder: Path, model: Path, env: dict[str, str], kv: dict[str, Any], **options: Any
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = {
            "port": self.port,
            "host": "127.0.0.1",
            "served-model-name": "tiny",
            "dtype": "float32",
            "block-size": 32,
            "max-model-len": 1024,
            "kv-transfer-config": json.dumps(kv),
            **options,
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        flags += ["--enforce-eager", "--enable-prompt-tokens-details"]
        env = {**env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        super().__init__(folder, [program("vllm"), "serve", str(model), *flags], env)

    def ready(self) -> Instance:
        """Wait until it answers."""
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError):
                self.get("/health")
                return self
            if self.ended or time.monotonic() > end:
                text = self.out[-3000:] + self.err[-3000:]
                raise RuntimeError(f"did not start\n{text}")
            time.sleep(0.1)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict[str, Any]) -> str:
        return post(self.url + path, body)

    def ask(self, prompt: list[int], **more: Any) -> tuple[list[int], int]:
        """(tokens, how many of the prompt's were not computed)."""
        return answered(self.post("/v1/completions", completion(prompt, **more)))

    def metric(self, name: str, **labels: str) -> float:
        """A counter's sum, over all whose labels are these and any others."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
            if sample.name == f"{name}_total" and labels.items() <= sample.labels.items()
        )


def completion(prompt: list[int], **more: Any) -> dict[str, Any]:
    """The body of a request for what follows `prompt`."""
    return {
        "model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": True,
        "return_token_ids": True, **more,
    }  # fmt: skip


def post(url: str, body: dict[str, Any]) -> str:
    """What it answers, to its end."""
    data, head = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, head), timeout=PATIENCE) as got:
        return got.read().decode()


def answered(text: str) -> tuple[list[int], int]:
    """(tokens, how many of the prompt's were not computed) of an answer."""
    answer = json.loads(text)
    details = answer["usage"]["prompt_tokens_details"] or {}
    return answer["choices"][0]["token_ids"], details.get("cached_tokens", 0)
