"""Redis servers of every kind: one, a replica, Sentinel's, a cluster of three masters."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import redis as stock

from tests.servers import PATIENCE, Server, answers, eventually, free_port, program, running


def redis_server(folder: Path, port: int, *options: str, ready: bytes = b"+PONG") -> Server:
    """A server on `port` that keeps nothing on disk. `ready`: how it answers a PING."""
    command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--dir", str(folder), "--save", "", "--appendonly", "no"]
    command += ["--repl-diskless-sync-delay", "0", *options]
    return Server(command, answers(port, b"PING\r\n", ready), folder / f"redis-{port}.log")


@contextlib.contextmanager
def cluster(folder: Path, *options: str) -> Iterator[list[tuple[int, Server]]]:
    """Three masters that share the slots: (port, server) of each."""
    nodes: list[tuple[int, Server]] = []
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            port = free_port()
            bus = free_port()
            own = ["--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{port}.conf"]
            own += ["--cluster-port", str(bus), "--cluster-node-timeout", "1000", *options]
            nodes.append((port, stack.enter_context(running(redis_server(folder, port, *own)))))
        places = [f"127.0.0.1:{port}" for port, _ in nodes]
        create = [program("redis-cli"), "--cluster", "create", *places, "--cluster-yes"]
        subprocess.run(create, check=True, capture_output=True, timeout=PATIENCE)
        for port, _ in nodes:
            with stock.Redis(port=port, protocol=2) as client:
                eventually(lambda: client.cluster("info")["cluster_state"] == "ok")
        yield nodes


@contextlib.contextmanager
def sentinels(folder: Path, count: int) -> Iterator[tuple[list[int], Server, Server]]:
    """A master and a replica that `count` sentinels watch: their ports, and both servers."""
    master, replica = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(running(redis_server(folder, master)))
        follow = ["--replicaof", "127.0.0.1", str(master)]
        second = stack.enter_context(running(redis_server(folder, replica, *follow)))
        with stock.Redis(port=replica, protocol=2) as client:
            eventually(lambda: client.info("replication")["master_link_status"] == "up")
        ports = [free_port() for _ in range(count)]
        for port in ports:
            config = folder / f"sentinel-{port}.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
                f"sentinel monitor kv 127.0.0.1 {master} {count // 2 + 1}\n"
                "sentinel down-after-milliseconds kv 500\nsentinel failover-timeout kv 3000\n"
            )
            command = [program("redis-server"), str(config), "--sentinel"]
            log = folder / f"sentinel-{port}.log"
            stack.enter_context(running(Server(command, answers(port, b"PING\r\n", b"+PONG"), log)))
        for port in ports:
            with stock.Redis(port=port, protocol=2) as client:
                eventually(lambda: len(client.sentinel_slaves("kv")) == 1)
                eventually(lambda: len(client.sentinel_sentinels("kv")) == count - 1)
        yield ports, first, second
