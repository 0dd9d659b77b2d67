"""Two nodes with nothing in common but a server: what one computed, the other's first request has.

For Redis also over a network of 1 Gbit/s and 1 ms, between two network namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.backends.redis_servers import redis_server
from tests.backends.test_memcached import memcached_server
from tests.e2e.conftest import CHUNK, Node, two_nodes
from tests.s3_server import BUCKET, KEY_ID, SECRET, s3_server
from tests.servers import Server, free_port, program, running

pytestmark = pytest.mark.xdist_group("smollm2")


@pytest.fixture(params=["redis", "memcached", "s3"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A tier on a server that only this test uses."""
    tiers = {"redis": redis_tier, "memcached": memcached_tier, "s3": s3_tier}
    with tiers[request.param](tmp_path) as tier:
        yield {"backend": request.param, "deadline": "5s", **tier}


@contextlib.contextmanager
def redis_tier(folder: Path) -> Iterator[dict[str, Any]]:
    port = free_port()
    with running(redis_server(folder, port)):
        yield {"url": f"redis://127.0.0.1:{port}"}


@contextlib.contextmanager
def memcached_tier(folder: Path) -> Iterator[dict[str, Any]]:
    port = free_port()
    with running(memcached_server(port, "-m", "500")):
        yield {"url": f"memcached://127.0.0.1:{port}"}


@contextlib.contextmanager
def s3_tier(folder: Path) -> Iterator[dict[str, Any]]:
    with s3_server(folder) as server:
        login = f"{KEY_ID}:{SECRET.replace('/', '%2F')}"
        yield {"url": f"s3://{login}@{BUCKET}", "endpoint": server.endpoint}


def compare(
    nodes: Sequence[Node],
    tiers: Sequence[dict[str, Any]],
    text: torch.Tensor,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """The first node computes and stores, the other loads; says how long until the first token."""
    computed, reused = [node.answer(tier, text) for node, tier in zip(nodes, tiers, strict=True)]
    assert reused["output"] == computed["output"]
    chunks = (text.shape[1] - 1) // CHUNK
    name = tiers[0]["backend"]
    assert reused["loaded"] == {name: 2 * chunks}  # for each of two answers
    with capsys.disabled():
        saved = 1 - reused["ttft"] / computed["ttft"]
        print(
            f"\n{name}, {where}: time to first token {computed['ttft']:.2f} s on node A,"
            f" {reused['ttft']:.2f} s on node B, {saved:.0%} saved"
        )


def test_the_second_node_reuses_what_the_first_computed(
    nodes: list[Node],
    tier: dict[str, Any],
    text: torch.Tensor,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compare(nodes, [tier, tier], text, capsys, "loopback")


class Network(NamedTuple):
    """Commands that run something in either of two namespaces; they reach each other by wire."""

    first: Sequence[str]
    second: Sequence[str]
    address: str
    """Of the first, as the second sees it."""


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr}")


@pytest.fixture
def network() -> Iterator[Network]:
    """Two network namespaces, 1 Gbit/s each way between them."""
    if os.geteuid() != 0 or not shutil.which("tc"):
        pytest.skip("network namespaces need root, and the package iproute2")
    names = [f"lmcache-{side}-{os.getpid()}" for side in "ab"]
    links = [f"lmc{side}{os.getpid()}" for side in "ab"]
    addresses = ["10.231.77.1", "10.231.77.2"]
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        ip("link", "add", links[0], "netns", names[0], "type", "veth",
           "peer", "name", links[1], "netns", names[1])  # fmt: skip
        for name, link, address in zip(names, links, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("netns", "exec", name, "tc", "qdisc", "add", "dev", link, "root",
               "tbf", "rate", "1gbit", "burst", "256kb", "latency", "20ms")  # fmt: skip
        inside = [("ip", "netns", "exec", name) for name in names]
        yield Network(inside[0], inside[1], addresses[0])


def test_over_a_network_of_1_gbit_and_1_ms(
    network: Network, text: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The delay is a relay's on the second node: not every kernel has tc's netem."""
    port, near = 6379, 6380
    serve = [*network.first, program("redis-server"), "--port", str(port), "--bind", "0.0.0.0"]
    serve += ["--protected-mode", "no", "--save", "", "--dir", str(tmp_path)]
    delay = [sys.executable, "-m", "tests.e2e.relay", str(near), network.address, str(port)]
    ask = [program("redis-cli"), "-p"]

    def says(within: Sequence[str], where: int) -> bool:
        out = subprocess.run([*within, *ask, str(where), "ping"], capture_output=True, check=True)
        assert out.stdout == b"PONG\n"
        return True

    tiers = [
        {"backend": "redis", "deadline": "5s", "url": f"redis://{address}"}
        for address in (f"127.0.0.1:{port}", f"127.0.0.1:{near}")
    ]
    with (
        running(Server(serve, lambda: says(network.first, port))),
        running(Server([*network.second, *delay, "0.001"], lambda: says(network.second, near))),
        two_nodes(network.first, network.second) as nodes,
    ):
        compare(nodes, tiers, text, capsys, "1 Gbit/s, 1 ms")
