"""Config: what is understood, and that every mistake is named with its place and a way out."""

from __future__ import annotations

import re
import threading
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import lmcache_core
from lmcache_backends.local_cpu import LocalCpuBackend
from lmcache_core import Config, ConfigError, TierConfig
from lmcache_core.backend import Duration, Options, Size, StorageBackend
from lmcache_core.config import models as config
from lmcache_core.config.loading import load
from lmcache_core.plugins import registry as components
from lmcache_core.serde import BytesToBytes

GOOD = """\
chunk_size: 128
tiers:
  - backend: local_cpu
    capacity: 8GiB
  - backend: disk
    path: /tmp/cache
    capacity: 200 GB
    serde: [{zstd: {level: 3}}]
    deadline: 200ms
    name: ssd
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "cache.yaml"
    file.write_text(text)
    return file


def problem(tmp_path: Path, text: str) -> str:
    """What load says about a file, without the folder's name."""
    with pytest.raises(ConfigError) as raised:
        load(written(tmp_path, text))
    return str(raised.value).replace(f"{tmp_path}/", "")


def test_yaml_a_mapping_and_python_objects_end_in_the_same_config(tmp_path: Path) -> None:
    from_yaml = load(written(tmp_path, GOOD))
    assert from_yaml.chunk_size == 128
    memory, disk = from_yaml.tiers
    assert memory.options.capacity == 8 << 30
    assert (disk.options.path, disk.options.capacity) == (Path("/tmp/cache"), 200 * 10**9)
    assert (disk.name, disk.deadline, disk.serde[0].options.level) == ("ssd", 0.2, 3)
    from_mapping = load(yaml.safe_load(GOOD))
    from_objects = Config(
        chunk_size=128,
        tiers=[
            TierConfig(backend="local_cpu", capacity="8GiB"),
            TierConfig(
                backend="disk",
                path="/tmp/cache",
                capacity="200GB",
                serde=[{"zstd": {"level": 3}}],
                deadline=0.2,
                name="ssd",
            ),
        ],
    )
    for other in (from_mapping, from_objects, load(from_objects)):
        assert other.model_dump(exclude={"tiers": {"__all__": {"where"}}}) == from_yaml.model_dump(
            exclude={"tiers": {"__all__": {"where"}}}
        )


@pytest.mark.parametrize(
    "serde", ["zstd", ["zstd"], {"zstd": {"level": 1}}, {"zstd": None}, [{"name": "zstd"}]]
)
def test_a_serde_is_a_name_or_a_name_with_options(serde: Any) -> None:
    tier = TierConfig(backend="local_cpu", capacity=9, serde=serde)
    assert [(s.name, s.options.level) for s in tier.serde] == [("zstd", 1)]


def test_tiers_of_one_backend_have_names_of_their_own(tmp_path: Path) -> None:
    disks = [{"backend": "disk", "path": str(tmp_path / n), "capacity": 9} for n in "abc"]
    assert [tier.name for tier in load({"tiers": disks}).tiers] == ["disk", "disk2", "disk3"]


# Mistakes: each is replaced in GOOD, and the message is what a person reads.
MISTAKES = {
    "misspelt key": (
        "capacity: 8GiB", "capacty: 8GiB",
        ["cache.yaml:4: tiers[0].capacty: unknown key, did you mean 'capacity'?",
         "cache.yaml:3: tiers[0].capacity: required, but not there"]),
    "misspelt top key": (
        "chunk_size: 128", "chunksize: 128",
        ["cache.yaml:1: chunksize: unknown key, did you mean 'chunk_size'? Known: chunk_size, load, strict, tiers"]),
    "wrong size": (
        "capacity: 8GiB", "capacity: lots",
        ["cache.yaml:4: tiers[0].capacity: expected a size such as 8GiB", "found 'lots'"]),
    "negative size": (
        "capacity: 8GiB", "capacity: -1", ["cache.yaml:4: tiers[0].capacity: expected a size"]),
    "boolean size": (
        "capacity: 8GiB", "capacity: yes", ["cache.yaml:4", "found True"]),
    "wrong duration": (
        "deadline: 200ms", "deadline: soon", ["cache.yaml:9: tiers[1].deadline: expected a duration"]),
    "zero duration": ("deadline: 200ms", "deadline: 0", ["cache.yaml:9"]),
    "wrong chunk size": (
        "chunk_size: 128", "chunk_size: many",
        ["cache.yaml:1: chunk_size: expected a valid integer; found 'many'"]),
    "zero chunk size": (
        "chunk_size: 128", "chunk_size: 0",
        ["cache.yaml:1: chunk_size: expected greater than or equal to 1"]),
    "unknown backend": (
        "backend: disk", "backend: dsik",
        ["cache.yaml:5: tiers[1].backend: unknown backend 'dsik', did you mean 'disk'?",
         "Known: disk, local_cpu"]),
    "no backend": (
        "backend: disk\n    path", "path", ["cache.yaml:5: tiers[1].backend: required"]),
    "unknown serde": (
        "[{zstd: {level: 3}}]", "[zst]",
        ["cache.yaml:8: tiers[1].serde[0]: unknown serde 'zst', did you mean 'zstd'?"]),
    "serde option out of range": (
        "level: 3", "level: 99",
        ["cache.yaml:8: tiers[1].serde[0].zstd.level: expected less than or equal to 22; found 99"]),
    "misspelt serde option": (
        "level: 3", "lvl: 3", ["cache.yaml:8: tiers[1].serde[0].zstd.lvl: unknown key"]),
    "impossible serde order": (
        "[{zstd: {level: 3}}]", "[zstd, raw]",
        ["cache.yaml:8: tiers[1].serde: impossible serde order [zstd, raw]"]),
    "two middles": (
        "[{zstd: {level: 3}}]", "[raw, safetensors]", ["cache.yaml:8: tiers[1].serde: two steps"]),
    "serde of a wrong type": (
        "[{zstd: {level: 3}}]", "7", ["cache.yaml:8: tiers[1].serde: expected serde names"]),
    "wrong choice": (
        "name: ssd", "when_full: wait",
        ["cache.yaml:10: tiers[1].when_full: expected 'drop' or 'block'; found 'wait'"]),
    "a key twice": (
        "name: ssd", "path: /other",
        ["cache.yaml:10: path stands here and on line 6"]),
    "a key that is a list": (
        "chunk_size: 128", "? [chunk_size]\n: 128",
        ["cache.yaml:1: expected a name before the colon; found a sequence"]),
    "a key that is a mapping": (
        "name: ssd", "{name: x}: ssd",
        ["cache.yaml:10: expected a name before the colon; found a mapping"]),
    "a wrong rule for loads": (
        "chunk_size: 128", "load: never",
        ["cache.yaml:1: load: expected 'when_faster' or 'always'; found 'never'"]),
    "not yaml": ("chunk_size: 128", "chunk_size: [1", ["cache.yaml:2: not YAML"]),
    "a tier that is text": (
        "- backend: local_cpu\n    capacity: 8GiB", "- local_cpu",
        ["cache.yaml:3: tiers[0]: expected keys and values; found 'local_cpu'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_file_line_and_key(tmp_path: Path, name: str) -> None:
    old, new, says = MISTAKES[name]
    assert old in GOOD
    text = problem(tmp_path, GOOD.replace(old, new))
    for part in says:
        assert part in text


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("8GiB", "lots").replace("200ms", "soon").replace("chunk_size", "chunk")
    lines = problem(tmp_path, text).splitlines()
    assert [line.split(":")[1] for line in lines] == ["1", "4", "9"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cache.yaml:1: expected keys such as chunk_size and tiers; found an empty file"),
        ("- a", "cache.yaml:1: expected keys"),
        ("tiers: []", "cache.yaml:1: tiers: expected a list of tiers, at least one; found []"),
        ("chunk_size: 3", "tiers: required, but not there"),
        ("tiers: 3", "cache.yaml:1: tiers: expected a list of tiers, at least one; found 3"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, says: str) -> None:
    assert says in problem(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.yaml: cannot be read: No such file"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary.yaml")


def test_two_tiers_on_one_directory_are_refused_even_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    text = GOOD.replace("/tmp/cache", str(tmp_path / "cache"))
    text += f"  - backend: disk\n    path: {tmp_path}/link\n    capacity: 1GiB\n"
    said = problem(tmp_path, text)
    assert "cache.yaml:11: tiers[2]: the same store as cache.yaml:5: tiers[1]" in said


def test_an_unwritable_path_is_named_when_the_tier_opens(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    file = written(tmp_path, GOOD.replace("/tmp/cache", f"{tmp_path}/file/cache"))
    with pytest.raises(ConfigError, match=r"cache.yaml:5: tiers\[1\]: path: .*Not a directory"):
        lmcache_core.open(file)


def test_a_config_does_not_change() -> None:
    config = load({"tiers": [{"backend": "local_cpu", "capacity": 9}]})
    with pytest.raises(ValueError, match="frozen"):
        config.chunk_size = 1  # type: ignore[misc]


def test_secrets_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Secretive(Options):
        password: int
        url: int

    monkeypatch.setattr(LocalCpuBackend, "Options", Secretive)
    text = problem(
        tmp_path,
        "tiers:\n- backend: local_cpu\n  password: hunter2\n  url: redis://me:hunter2@host/0\n",
    )
    assert "hunter2" not in text
    assert "tiers[0].password: expected a valid integer" in text
    assert "redis://***@host/0" in text


@pytest.mark.parametrize(
    "url",
    [
        "redis:/me:hunter2@host",
        "me:hunter2@host",
        "redis://me:hun ter2@x:hunter2@host:port",
        "@hunter2@",
    ],
)
def test_no_part_of_a_broken_url_that_may_be_a_password_is_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.url: .*\*\*\*@") as caught:
        load({"tiers": [{"backend": "redis", "url": url}]})
    assert "ter2" not in str(caught.value)


def test_a_key_below_another_is_compared_with_those_of_its_own_place() -> None:
    tier = {"backend": "redis", "url": "rediss://h", "tls": {"chek_hostname": True}}
    with pytest.raises(ConfigError) as caught:
        load({"tiers": [tier]})
    assert str(caught.value) == (
        "tiers[0].tls.chek_hostname: unknown key, did you mean 'check_hostname'? "
        "Known: ca, cert, check_hostname, key"
    )


def test_the_modules_own_example_is_a_config() -> None:
    example = yaml.safe_load(config.__doc__.partition("\n\n")[2])
    assert [tier.backend for tier in load(example).tiers] == ["local_cpu", "disk"]


class NoName(BytesToBytes):
    Options = Options

    def encode(self, parts: Any, context: bytes) -> Any: ...
    def decode(self, payload: Any, context: bytes, allocate: Any, limit: int) -> Any: ...


class OtherName(NoName):
    name = "other"


class Unfinished(StorageBackend):
    Options = Options


class Angry(Unfinished):
    def __init__(self, options: Any) -> None:
        raise OSError("not today")


Angry.__abstractmethods__ = frozenset()


PLUGINS: dict[str, tuple[str, str, str]] = {
    "no such class": ("backends", "json:NoSuch", "cannot be imported: module 'json' has no"),
    "no such module": ("serdes", "no_such_module:X", "cannot be imported: No module named"),
    "no backend": ("backends", "json:JSONDecoder", "is no StorageBackend"),
    "no class": ("backends", "json:dumps", "is no StorageBackend"),
    "no serde": ("serdes", "json:JSONDecoder", "is no Serde"),
    "a serde without a name": ("serdes", f"{__name__}:NoName", "has the name None"),
    "a serde of another name": ("serdes", f"{__name__}:OtherName", "has the name 'other'"),
    "an unfinished backend": (
        "backends",
        f"{__name__}:Unfinished",
        "lacks contains, delete, get, put",
    ),
    "one that cannot be opened": ("backends", f"{__name__}:Angry", "not today"),
}


@pytest.mark.parametrize("fault", PLUGINS)
def test_a_faulty_plugin_is_a_config_error_at_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    group, target, says = PLUGINS[fault]
    entry = EntryPoint("mine", target, f"lmcache_core.{group}")
    monkeypatch.setitem(components._entries(group), "mine", [entry])
    file = tmp_path / "cache.yaml"
    tier = (
        "backend: mine"
        if group == "backends"
        else "backend: local_cpu\n  capacity: 9\n  serde: mine"
    )
    file.write_text(f"tiers:\n- {tier}\n")
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        lmcache_core.open(file)
    assert str(caught.value).startswith(f"{file}:{'2' if group == 'backends' else '4'}: tiers[0]")


class Units(BaseModel):
    size: Size = 1
    duration: Duration = 1.0


@given(st.integers(1, 2**50))
def test_a_number_is_bytes_or_seconds(number: int) -> None:
    assert Units(size=number).size == Units(size=str(number)).size == number
    assert Units(duration=number).duration == number


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GiB", 8 << 30), ("8 gib", 8 << 30), ("1.5KiB", 1536), ("3MB", 3_000_000), ("2TiB", 2 << 40),
     ("7B", 7), ("7kb", 7000)],
)  # fmt: skip
def test_sizes(text: str, value: int) -> None:
    assert Units(size=text).size == value


@pytest.mark.parametrize(
    ("text", "value"), [("200ms", 0.2), ("1.5s", 1.5), ("2m", 120), ("1h", 3600), ("500us", 0.0005)]
)
def test_durations(text: str, value: float) -> None:
    assert Units(duration=text).duration == pytest.approx(value)


@given(
    st.one_of(st.text(), st.booleans(), st.none(), st.floats(max_value=0), st.just(float("nan")))
)
def test_anything_else_is_neither(value: object) -> None:
    text = isinstance(value, str) and any(c.isdecimal() for c in value)
    if not text:
        for field in ("size", "duration"):
            with pytest.raises(ValueError, match="expected a"):
                Units(**{field: value})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    st.integers(0, len(GOOD)),
    st.integers(0, 30),
    st.text(alphabet=GOOD + "&*!|>'\"%@`#?,", max_size=6),
)
def test_any_mutated_file_is_a_config_or_a_config_error_with_its_name(
    tmp_path: Path, start: int, length: int, insert: str
) -> None:
    file = written(tmp_path, GOOD[:start] + insert + GOOD[start + length :])
    try:
        load(file)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith(str(file)) or line.startswith(("tiers: required", " "))


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_an_unknown_key_is_always_named(key: str) -> None:
    known = {"name", "backend", "serde", "deadline", "queue", "when_full", "capacity", "eviction"}
    if key not in known:
        with pytest.raises(ConfigError, match=rf"tiers\[0\]\.{key}: unknown key"):
            load({"tiers": [{"backend": "local_cpu", "capacity": 9, key: 1}]})


# What is possible and hardly meant


def advice(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    """The lines that are logged for a file, without the folder's name."""
    caplog.clear()
    load(written(tmp_path, text))
    return [record.getMessage().replace(f"{tmp_path}/", "") for record in caplog.records]


MEMORY = "- {backend: local_cpu, capacity: 1MiB}\n"


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        (f"- {{backend: disk, path: /tmp/kv, capacity: 9}}\n{MEMORY}",
         "cache.yaml:3: tiers[1]: local_cpu (memory) stands behind disk (disk)"),
        (f"- {{backend: s3, url: 's3://kv'}}\n{MEMORY}",
         "cache.yaml:3: tiers[1]: local_cpu (memory) stands behind s3 (object store)"),
        ("- {backend: s3, url: 's3://kv'}\n- {backend: redis, url: 'redis://h'}\n",
         "cache.yaml:3: tiers[1]: redis (server) stands behind s3 (object store)"),
        ("- backend: local_cpu\n  capacity: 1MiB\n  queue: 1MiB\n",
         "cache.yaml:4: tiers[0].queue: does nothing for local_cpu"),
        ("- backend: shm\n  capacity: 1MiB\n  when_full: block\n",
         "cache.yaml:4: tiers[0].when_full: does nothing for shm"),
        ("- backend: local_cpu\n  capacity: 100TiB\n",
         "cache.yaml:3: tiers[0].capacity: 102400.0 GiB, and the memory of local_cpu has"),
        ("- backend: shm\n  capacity: 100TiB\n",
         "cache.yaml:3: tiers[0].capacity: 102400.0 GiB, and the memory of shm has"),
        ("- backend: disk\n  path: /tmp/not/yet/there\n  capacity: 100000TiB\n",
         "cache.yaml:4: tiers[0].capacity: 102400000.0 GiB, and the disk of disk has"),
    ],
)  # fmt: skip
def test_what_is_hardly_meant_is_said_with_its_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tiers: str, says: str
) -> None:
    (line,) = advice(tmp_path, caplog, f"tiers:\n{tiers}")
    assert line.startswith(says)


def test_a_usual_config_is_taken_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiers = f"tiers:\n{MEMORY}- {{backend: redis, url: 'redis://h', queue: 1MiB}}\n"
    more = "- {backend: disk, path: /tmp/kv, capacity: 1MiB}\n- {backend: s3, url: 's3://kv'}\n"
    assert advice(tmp_path, caplog, tiers + more) == []


def test_a_medium_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go = threading.Event()
    monkeypatch.setattr(LocalCpuBackend.Options, "medium_bytes", lambda self: go.wait(60))
    began = time.monotonic()
    load({"tiers": [{"backend": "local_cpu", "capacity": 9}]})
    assert time.monotonic() - began < 30
    go.set()


@pytest.mark.parametrize("text", ["200", "0.5", "'200'"])
def test_a_duration_in_a_file_has_a_unit(tmp_path: Path, text: str) -> None:
    said = problem(tmp_path, GOOD.replace("200ms", text))
    assert "cache.yaml:9: tiers[1].deadline: expected a duration with its unit: " in said
    number = text.strip("'")
    assert f"{number}ms, {number}s" in said
    assert load({"tiers": [{"backend": "local_cpu", "capacity": 9, "deadline": 2}]})
    with pytest.raises(ConfigError, match=r"extra: .*with its unit"):
        load({"tiers": [{"backend": "local_cpu", "capacity": 9, "deadline": 2}]}, "extra")


def test_a_password_that_stands_in_a_variables_place_is_not_shown() -> None:
    tier = {"backend": "redis", "url": "redis://127.0.0.1:9", "password_env": "hunter2-SECRET"}
    with pytest.raises(ConfigError, match="is not set") as caught:
        lmcache_core.open({"tiers": [tier]})
    assert "hunter2" not in str(caught.value)
