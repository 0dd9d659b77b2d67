"""LMCache's settings as deployments have them: used, passed over with a line, or refused at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lmcache_core import Config, ConfigError
from lmcache_core.config.loading import load
from lmcache_core.connector import environment_is_set

WORD = "hunter2SECRET"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith(("LMCACHE_", "REDIS_"))]:
        monkeypatch.delenv(name)


def of_file(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "lmcache.yaml"
    file.write_text(text)
    return load(file)


def refused(tmp_path: Path, text: str) -> list[str]:
    """The lines of the error, without the file's folder."""
    with pytest.raises(ConfigError) as caught:
        of_file(tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def options(config: Config) -> Any:
    (tier,) = config.tiers
    return tier.options


def url(config: Config) -> str:
    text: str = options(config).url.get_secret_value()
    return text


PLAIN = "chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 0.1\n"
"""A file that means something here, whatever follows."""


@pytest.mark.parametrize(
    "line",
    [
        "save_decode_cache: true", "save_unfull_chunk: true", "numa_mode: auto",
        "pre_caching_hash_algorithm: sha256_cbor", "cache_policy: LRU", "use_layerwise: true",
        "enable_kv_events: true", "blocking_timeout_secs: 30", "local_disk_path_sharding: by_gpu",
        "extra_config: {save_only_first_rank: true}", "enable_p2p: false", "enable_blending: False",
        "p2p_host: localhost", "pipelined_backend: false", "nixl_buffer_size: 1073741824",
        "lmcache_instance_id: a", "internal_api_server_enabled: true", "use_experimental: true",
        "blend_recompute_ratios: [0.15]", "storage_plugins: []", "retrieve_locations: null",
    ],
)  # fmt: skip
def test_what_only_tunes_lmcache_or_says_what_happens_anyway_is_no_error(
    tmp_path: Path, line: str
) -> None:
    assert [tier.backend for tier in of_file(tmp_path, PLAIN + line).tiers] == ["local_cpu"]


@pytest.mark.parametrize(
    "line",
    [
        "enable_p2p: true", "enable_blending: 'True'", "enable_pd: true", "enable_xpyd: on",
        "enable_controller: 1", "gds_path: /mnt/gds", "storage_plugins: [mine]",
        "remote_config_url: http://h/config", "mp_host: tcp://h", "cache_policy: MRU",
        "store_location: RemoteBackend", "remote_serde: cachegen",
        "extra_config: {enable_nixl_storage: true}", "external_lookup_client: mooncakestore://h",
    ],
)  # fmt: skip
def test_what_would_change_meaning_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    (said,) = refused(tmp_path, PLAIN + line)
    assert said.startswith(f"lmcache.yaml:4: {line.partition(':')[0]}")
    assert "no equivalent" in said


def test_all_that_is_refused_is_named_at_once(tmp_path: Path) -> None:
    text = "enable_p2p: true\nmax_local_cpu_size: 5GB\nremote_url: lm://h:1\nlocal_cpu: maybe\n"
    assert [line.split(":")[1] for line in refused(tmp_path, text)] == ["1", "2", "3", "4"]


def test_one_line_says_what_became_of_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = "numa_mode: auto\nlocl_disk: /x\nextra_config: {lmcache_rpc_port: 1}\n"
    of_file(tmp_path, PLAIN + more)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"LMCache's settings ({tmp_path}/lmcache.yaml): used: chunk_size, local_cpu, "
        "max_local_cpu_size, extra_config; passed over, for they only tune LMCache: numa_mode, "
        "extra_config.lmcache_rpc_port; passed over, for nobody knows them: locl_disk (did you "
        "mean 'local_disk'?)"
    )


def test_a_file_of_which_all_is_used_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_file(tmp_path, PLAIN)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# The environment


def of_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> Config:
    for name, value in values.items():
        monkeypatch.setenv(f"LMCACHE_{name}", value)
    return load()


@pytest.mark.parametrize(
    "more",
    [
        {"USE_EXPERIMENTAL": "True"}, {"TRACK_USAGE": "false"}, {"LOG_LEVEL": "DEBUG"},
        {"NOBODY_KNOWS": "1"}, {"SHM_SECONDS": "600"}, {"EC_LOCAL_CPU": "True"},
    ],
)  # fmt: skip
def test_a_variable_without_meaning_never_turns_the_cache_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, more: dict[str, str]
) -> None:
    config = of_environment(monkeypatch, LOCAL_CPU="True", **more)
    assert [tier.backend for tier in config.tiers] == ["local_cpu"]
    assert "passed over" in caplog.text


KUBERNETES = {
    "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80",
    "PORT": "tcp://10.0.0.1:80", "PORT_80_TCP": "tcp://10.0.0.1:80", "PORT_80_TCP_PROTO": "tcp",
    "PORT_80_TCP_PORT": "80", "PORT_80_TCP_ADDR": "10.0.0.1", "REDIS_SERVICE_HOST": "10.0.0.2",
    "REDIS_SERVICE_PORT": "6379", "REDIS_PORT": "tcp://10.0.0.2:6379",
    "REDIS_PORT_6379_TCP_ADDR": "10.0.0.2", "MP_PORT": "tcp://10.0.0.3:1",
    "CONTROLLER_SERVICE_HOST": "10.0.0.4", "CONTROLLER_SERVICE_PORT_PULL": "1",
}  # fmt: skip


def test_what_kubernetes_sets_for_a_service_is_nothing_of_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = of_environment(monkeypatch, LOCAL_CPU="True", **KUBERNETES)
    assert [tier.backend for tier in config.tiers] == ["local_cpu"]
    monkeypatch.delenv("LMCACHE_LOCAL_CPU")
    assert not environment_is_set()
    with pytest.raises(ConfigError, match="nothing says where"):
        load()
    file = tmp_path / "cache.yaml"
    file.write_text("tiers: [{backend: local_cpu, capacity: 1MiB}]")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    assert load().tiers
    assert environment_is_set()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("form", ['"{}"', "'{}'", " {} ", '" {} "', '"file://{}"', "file://{} "])
def test_quotes_and_blanks_around_a_path_mean_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    config = of_environment(
        monkeypatch, LOCAL_DISK=form.format(tmp_path), MAX_LOCAL_DISK_SIZE="'1'", LOCAL_CPU="'no'"
    )
    assert options(config).path == tmp_path


def test_the_home_and_variables_in_a_path_are_what_a_shell_makes_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("~/kv", "$HOME/kv", "${HOME}/kv"):
        config = of_environment(monkeypatch, LOCAL_DISK=text, MAX_LOCAL_DISK_SIZE="1")
        assert options(config).path == tmp_path / "kv"
    monkeypatch.setenv("LMCACHE_LOCAL_DISK", "$NO_SUCH_NAME/kv")
    with pytest.raises(ConfigError, match=r"LMCACHE_LOCAL_DISK: .*\$NO_SUCH_NAME is not set"):
        load()


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    config = of_environment(
        monkeypatch, LOCAL_CPU="1", REMOTE_URL="", CHUNK_SIZE=" ", LOCAL_DISK=""
    )
    assert [tier.backend for tier in config.tiers] == ["local_cpu"]


def test_a_setting_that_means_nothing_may_stand_beside_a_file_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cache.yaml"
    file.write_text("tiers: [{backend: local_cpu, capacity: 1MiB}]")
    config = of_environment(monkeypatch, CONFIG_FILE=f'"{file}"', USE_EXPERIMENTAL="True")
    assert [tier.backend for tier in config.tiers] == ["local_cpu"]
    assert "use_experimental" in caplog.text


# Memory and disks


def test_each_of_several_disks_is_a_tier_and_a_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    config = of_file(tmp_path, f'local_disk: "{a}/,file://{b}/, "\nmax_local_disk_size: 1\n')
    assert [tier.options.path for tier in config.tiers] == [a, b]
    assert "each tier holds every chunk" in caplog.text


def test_a_size_of_memory_means_memory(tmp_path: Path) -> None:
    config = of_file(tmp_path, "remote_url: redis://h\nmax_local_cpu_size: 1\n")
    assert [tier.backend for tier in config.tiers] == ["local_cpu", "redis"]


# URLs


@pytest.mark.parametrize(
    ("lines", "becomes", "keys"),
    [
        ("remote_url: redis-sentinel://h1:1,h2", "redis://h1:1,h2:26379", {"sentinel": "redismaster"}),
        ("remote_url: redis-cluster://h1:1,h2:2", "redis://h1:1,h2:2", {"cluster": True}),
        ("remote_url: valkey://h", "redis://h", {}),
        ("remote_url: resp://h:1\nextra_config: {username: me, password: a@b}", "redis://me:a%40b@h:1", {}),
        ("remote_url: valkey://h\nextra_config: {tls_enable: true, valkey_database: 3}", "rediss://h/3", {}),
        ("remote_url: valkey://h\nextra_config: {valkey_enable_ttl: true, valkey_ttl_sec: 60}", "redis://h", {"ttl": 60}),
        ("remote_url: s3://kv.s3.eu-west-1.amazonaws.com", "s3://kv", {"region": "eu-west-1"}),
        ("remote_url: s3://k.v.s3-eu-west-1.amazonaws.com/p", "s3://k.v/p", {"region": "eu-west-1"}),
        ("remote_url: s3://kv.s3.amazonaws.com", "s3://kv", {"region": None}),
        ("remote_url: s3://s3.us-gov-west-1.amazonaws.com/kv/p", "s3://kv/p", {"region": "us-gov-west-1"}),
        ("remote_url: s3://kv.h:1\nextra_config: {s3_region: r, disable_tls: true}", "s3://kv", {"endpoint": "http://h:1", "region": "r", "addressing": "virtual"}),
        ("remote_url: s3://kv\nextra_config: {aws_access_key_id: A, aws_secret_access_key: b/c}", "s3://A:b%2Fc@kv", {}),
    ],
)  # fmt: skip
def test_a_foreign_url_means_what_it_means_there(
    tmp_path: Path, lines: str, becomes: str, keys: dict[str, Any]
) -> None:
    config = of_file(tmp_path, lines)
    assert url(config) == becomes
    assert {key: getattr(options(config), key) for key in keys} == keys


def test_the_service_of_sentinels_and_a_password_come_from_lmcaches_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REDIS_SERVICE_NAME", "kv")
    config = of_environment(monkeypatch, REMOTE_URL="redis-sentinel://h1:1,h2:2")
    assert options(config).sentinel == "kv"
    config = of_environment(monkeypatch, REMOTE_URL="resp://h:1", RESP_PASSWORD=WORD)
    assert options(config).password_env == "LMCACHE_RESP_PASSWORD"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("remote_url: lm://h:1", "no equivalent for lm://. Understood: "),
        ("remote_url: fs://h:0/mnt/kv", "backend: disk, path: /mnt/kv"),
        ("remote_url: s3://kv.s3express-use1-az4.us-east-1.amazonaws.com", "s3express"),
        (f"remote_url: {WORD}", "expected a url such as redis://host:6379; found ***"),
        ("local_device: cpu", "first version (v0)"),
    ],
)
def test_what_cannot_be_had_says_how_it_is_written_here(
    tmp_path: Path, lines: str, says: str
) -> None:
    (said,) = refused(tmp_path, lines)
    assert says in said
    assert WORD not in said


def test_a_third_partys_scheme_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from lmcache_core.plugins import registry

    entry = EntryPoint("odd", f"{__name__}:Odd", "lmcache_core.backends")
    entries = registry._entries("backends")
    monkeypatch.setitem(entries, "odd", [entry])
    for text in ("odd://h", "odder://h"):
        config = of_environment(monkeypatch, REMOTE_URL=text)
        assert (config.tiers[0].backend, options(config).url) == ("odd", text)


def _odd() -> type:
    from lmcache_backends.local_cpu import LocalCpuBackend
    from lmcache_core.backend import Options

    class OddOptions(Options):
        url: str

    return type("Odd", (LocalCpuBackend,), {"Options": OddOptions, "schemes": ("odder",)})


Odd = _odd()
