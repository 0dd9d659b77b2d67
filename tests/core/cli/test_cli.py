"""lmcache-core: each command on real stores, and what it says to wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import lmcache_core
from lmcache_core import ChunkKey, Namespace, Tensors
from lmcache_core.cli.app import app
from lmcache_core.kv.namespace import tenant_digest
from tests.backends.redis_servers import redis_server
from tests.servers import free_port, running

Gather = Callable[[int, Tensors], None]
TOKENS, CHUNKS = 8, 5


class Ran:
    """What a command printed."""

    def __init__(self, *arguments: object) -> None:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        self.code, self.output, self.notes = result.exit_code, result.stdout, result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            self.code, self.notes = 2, str(result.exception)

    @property
    def json(self) -> Any:
        return json.loads(self.output)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A config of memory, a disk and a Redis server that runs."""
    port = free_port()
    with running(redis_server(tmp_path, port)):
        tiers = [
            {"backend": "local_cpu", "capacity": "1MiB"},
            {"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1MiB"},
            {"backend": "redis", "url": f"redis://127.0.0.1:{port}", "serde": ["zstd"]},
        ]
        path = tmp_path / "cache.yaml"
        path.write_text(yaml.safe_dump({"chunk_size": TOKENS, "tiers": tiers}))
        yield path


@pytest.fixture
def keys(file: Path, namespace: Namespace, gather: Gather) -> dict[str, list[ChunkKey]]:
    """Of what is stored: a model's, another's, and a tenant's."""
    stored = {
        "model": namespace,
        "other": namespace.model_copy(update={"model": "org/other"}),
        "tenant": namespace.model_copy(update={"tenant": tenant_digest("alice")}),
    }
    found = {}
    with lmcache_core.open(file) as cache:
        for name, each in stored.items():
            found[name] = cache.keys(each, range(CHUNKS * TOKENS))
            assert cache.store(each, found[name], gather) == CHUNKS
        assert cache.flush(30.0)
    return found


def test_check_says_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    wrong = tmp_path / "cache.yaml"
    wrong.write_text("chunk_sise: 8\ntiers:\n  - backend: dsk\n    path: /tmp/x\n")
    ran = Ran("check", wrong)
    assert ran.code == 2
    assert f"{wrong}:1: chunk_sise: unknown key, did you mean 'chunk_size'?" in ran.notes
    assert f"{wrong}:3: tiers[0].backend" in ran.notes
    assert "did you mean 'disk'?" in ran.notes


def test_check_connects_and_makes_nothing(file: Path, tmp_path: Path) -> None:
    ran = Ran("check", file, "--connect", "--json")
    assert ran.code == 0
    assert [tier["state"] for tier in ran.json] == ["answers", "not made yet", "answers"]
    assert not (tmp_path / "kv").exists()


def test_check_tells_of_a_store_that_does_not_answer(tmp_path: Path) -> None:
    file = tmp_path / "cache.yaml"
    url = f"redis://127.0.0.1:{free_port()}"
    file.write_text(yaml.safe_dump({"tiers": [{"backend": "redis", "url": url}]}))
    assert Ran("check", file).code == 0
    ran = Ran("check", file, "--connect", "--json")
    assert ran.code == 1
    assert "refused" in ran.json[0]["state"]


def test_show_says_where_each_value_is_from_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "cache.yaml"
    file.write_text(
        "tiers:\n- backend: redis\n  url: redis://kv:hunter2@cache:6379\n  deadline: 200ms\n  ttl: 90m\n"
    )
    ran = Ran("show", file)
    assert "deadline: 0.2s" in ran.output
    lines = {line.split(":")[0].strip(" -"): line for line in ran.output.splitlines()}
    assert lines["deadline"].endswith(f"# {file}:4")
    assert lines["queue"].endswith("# default")
    assert "hunter2" not in ran.output
    again = tmp_path / "again.yaml"
    again.write_text(Ran("show", Path(file)).output.replace("***", "x"))
    tier = lmcache_core.load_config(again).tiers[0]
    assert (tier.deadline, tier.options.ttl) == (0.2, 5400.0)


def test_schema_knows_each_backends_keys() -> None:
    tiers = Ran("schema").json["properties"]["tiers"]["items"]["oneOf"]
    by_name = {tier["properties"]["backend"]["const"]: tier for tier in tiers}
    assert {"capacity", "path", "deadline"} <= by_name["disk"]["properties"].keys()
    assert by_name["redis"]["required"] == ["backend", "url"]


def test_import_translates_a_lmcache_file(tmp_path: Path) -> None:
    theirs = tmp_path / "lmcache.yaml"
    theirs.write_text("chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 5\n")
    ours = tmp_path / "cache.yaml"
    ours.write_text(Ran("import", theirs).output)
    (tier,) = lmcache_core.load_config(ours).tiers
    assert (tier.backend, tier.options.capacity) == ("local_cpu", 5 << 30)
    assert "not a LMCache file" in Ran("import", ours).notes


def test_plugins_names_the_distribution() -> None:
    found = {(row["kind"], row["name"]): row for row in Ran("plugins", "--json").json}
    assert found["backends", "disk"]["from"].startswith("lmcache-core ")
    assert found["backends", "disk"]["state"] == "ok"


def test_status_tells_how_full_each_store_is(file: Path, keys: dict[str, list[ChunkKey]]) -> None:
    ran = Ran("status", "-c", file, "--json")
    assert ran.code == 0
    memory, disk, redis = ran.json
    assert "ask the engine" in memory["state"]
    assert (disk["state"], disk["chunks"], disk["capacity_bytes"]) == ("answers", 15, 1 << 20)
    assert redis["chunks"] == 15
    assert 0 < redis["used_bytes"] < disk["used_bytes"]


def test_ls_tells_what_is_stored_by_model_and_tenant(
    file: Path, keys: dict[str, list[ChunkKey]]
) -> None:
    lines = Ran("ls", "-c", file, "--json").json
    assert {(line["tier"], line["model"], line["tenant"], line["chunks"]) for line in lines} == {
        (tier, model, tenant, CHUNKS)
        for tier in ("disk", "redis")
        for model, tenant in [
            ("org/model@main", ""),
            ("org/other", ""),
            ("org/model@main", tenant_digest("alice")[:8]),
        ]
    }
    assert len(Ran("ls", "-c", file, "--model", "org/other", "--json").json) == 2
    assert len(Ran("ls", "-c", file, "--tenant", "alice", "--json").json) == 2


def test_inspect_shows_a_chunk_by_the_beginning_of_its_key_or_its_file(
    file: Path, keys: dict[str, list[ChunkKey]], tmp_path: Path
) -> None:
    key = str(keys["model"][2])
    for found in Ran("inspect", key[:40], "-c", file).json:
        assert found["key"] in map(str, keys["model"])
        assert found["checksum"] == "right"
    disk = [each for each in Ran("inspect", key, "-c", file).json if each["tier"] == "disk"]
    assert [(each["index"], each["tokens"], each["raw_bytes"]) for each in disk] == [
        (2, TOKENS, 512)
    ]
    (path,) = (tmp_path / "kv").rglob(f"{key}")
    assert Ran("inspect", path).json["namespace"]["model"] == "org/model@main"


def test_verify_finds_damage_and_removes_it(
    file: Path, keys: dict[str, list[ChunkKey]], tmp_path: Path
) -> None:
    assert Ran("verify", "-c", file).code == 0
    (path,) = (tmp_path / "kv").rglob(str(keys["model"][1]))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ran = Ran("verify", "-c", file, "--json")
    assert ran.code == 1
    assert [(found["tier"], found["key"]) for found in ran.json] == [
        ("disk", str(keys["model"][1]))
    ]
    assert Ran("verify", "-c", file, "--remove").code == 0
    assert not path.exists()
    assert Ran("verify", "-c", file).code == 0


def test_clear_says_what_would_go_and_goes_only_when_told(
    file: Path, keys: dict[str, list[ChunkKey]]
) -> None:
    dry = Ran("clear", "-c", file, "--model", "org/other", "--json")
    assert dry.json == [{"tier": "disk", "chunks": CHUNKS}, {"tier": "redis", "chunks": CHUNKS}]
    assert "nothing was removed" in dry.notes
    assert len(Ran("ls", "-c", file, "--model", "org/other", "--json").json) == 2
    assert Ran("clear", "-c", file, "--model", "org/other", "--yes", "--json").json == dry.json
    assert Ran("ls", "-c", file, "--model", "org/other", "--json").json == []
    assert len(Ran("ls", "-c", file, "--json").json) == 4
    assert "say --model" in Ran("clear", "-c", file).notes


def test_explain_tells_where_a_hit_ends_and_what_tells_namespaces_apart(
    file: Path, keys: dict[str, list[ChunkKey]], tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps([*range(3 * TOKENS), *range(500, 500 + TOKENS)]))
    assert Ran("clear", "-c", file, "--tenant", "alice", "--yes").code == 0
    ran = Ran("explain", prompt, "-c", file, "--json")
    assert ran.code == 0
    assert {(line["hit"], line["of"], line["ends"]) for line in ran.json} == {
        (3, 4, "never stored, or evicted")
    }
    assert sorted(line["differs_in"] for line in ran.json) == ["", "model"]
    prompt.write_text(json.dumps([9] * 3 * TOKENS))
    assert Ran("explain", prompt, "-c", file).code == 1
    prompt.write_text("{}")
    assert "expected a JSON list of token ids" in Ran("explain", prompt, "-c", file).notes


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "zz"),
        ("inspect", "0123456789abcdef"),
        ("check", "not-there.yaml"),
        ("show", "not-there.yaml"),
        ("ls", "-c", "not-there.yaml"),
        ("import", "not-there.yaml"),
        ("no-such-command",),
        ("ls", "--no-such-option"),
    ],
)
def test_wrong_input_is_a_sentence_and_exit_code_2(
    arguments: tuple[str, ...], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    ran = Ran(*arguments)
    assert ran.code == 2
    assert ran.notes
    assert "Traceback" not in ran.notes
