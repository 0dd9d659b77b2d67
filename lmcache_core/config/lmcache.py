"""LMCache's own settings, so that an existing deployment moves over: its YAML keys, its LMCACHE_*.

Each setting of LMCache 0.5.6 is one of three: `Settings` has what means something here; what only
tunes LMCache's inside is passed over, and named; what has no equivalent and would change meaning is
an error, all of them at once. A name that nobody knows is warned of.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from lmcache_core.config.problems import Problems, closest, in_environment
from lmcache_core.errors import ConfigError
from lmcache_core.plugins.log import LOG, log
from lmcache_core.plugins.registry import component, known
from lmcache_core.plugins.secrets import masked, shown, shown_key
from lmcache_core.plugins.units import unquoted

_PREFIX = "LMCACHE_"
SWITCH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
"""Ways to say yes and no. LMCache takes "yes" and "on" for no."""
_SERDES: dict[str, list[str]] = {"naive": [], "raw": [], "safetensor": ["safetensors"]}
_LOSSY = ("cachegen", "kivi")
_MEMORY_GIB = 5.0


def _switch(value: object) -> bool:
    said = SWITCH.get(str(value).strip().lower())
    if said is None:
        raise ValueError("expected true or false")
    return said


def _tokens(value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError("expected an integer") from None


def _gib(value: object) -> float:
    try:
        size = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        size = math.nan
    if not 0 <= size < 1e9:
        raise ValueError("expected a size in GiB such as 5 or 0.5")
    return size


def _directories(value: object) -> list[str]:
    """Of one path or several with commas between; of "false" none."""
    texts = value if isinstance(value, list) else str(value).split(",")
    if len(texts) == 1 and str(texts[0]).strip().lower() in SWITCH:
        if SWITCH[str(texts[0]).strip().lower()]:
            raise ValueError("expected a directory")
        return []
    return [unquoted(str(text)) for text in texts if unquoted(str(text))]


def _serde(value: object) -> list[str]:
    name = str(value).lower()
    if name in _LOSSY:
        raise ValueError(
            f"no equivalent for {name!r}; of its kind here are coded, int8 and int4, each a serde: "
            "of a tier in a file of ours"
        )
    if name not in _SERDES:
        raise ValueError(f"no equivalent for {name!r}. Understood: {', '.join(_SERDES)}")
    return _SERDES[name]


def _policy(value: object) -> str:
    name = str(value).lower()
    if name not in known("eviction"):
        raise ValueError(f"no equivalent. Understood: {', '.join(known('eviction'))}")
    return name


def _dictionary(value: object) -> dict[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, Mapping):
        raise ValueError("expected keys and values, or a JSON object of them")
    return {str(key): each for key, each in found.items()}


_Switch = Annotated[bool, BeforeValidator(_switch)]
_Text = Annotated[str, BeforeValidator(str)]


def _unlike(instead: str) -> AfterValidator:
    """For what LMCache does where a setting is on, and nobody does here."""

    def off(value: Any) -> Any:
        if str(value).strip().lower() in ("false", "no", "off", "0", "none", "null", "[]", "{}"):
            return value
        raise ValueError(f"no equivalent here: {instead}")

    return AfterValidator(off)


_SHARE = "engines share chunks through a tier that all reach: shm, redis, memcached or s3"
_PLUGINS = "a backend is named in tiers:, and found through its package's entry point"
_TIERS_ONLY = "every tier stores, and the fastest that has a chunk is loaded from"
_MEDIA = "the nearest is a tier of its own: backend: disk, or shm"


class Settings(BaseModel):
    """LMCache's settings that mean something here, and those whose meaning nothing here has."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    chunk_size: Annotated[int, BeforeValidator(_tokens)] = 256
    local_cpu: _Switch | None = None
    max_local_cpu_size: Annotated[float, BeforeValidator(_gib)] | None = None
    local_disk: Annotated[list[str], BeforeValidator(_directories)] = []
    max_local_disk_size: Annotated[float, BeforeValidator(_gib)] = 0.0
    remote_url: _Text = ""
    remote_serde: Annotated[list[str], BeforeValidator(_serde)] = []
    cache_policy: Annotated[str, BeforeValidator(_policy)] = "lru"
    extra_config: Annotated[dict[str, Any], BeforeValidator(_dictionary)] = {}
    use_local: _Switch | None = None
    use_remote: _Switch | None = None
    strict: _Switch = False
    """Ours."""

    enable_blending: Annotated[
        Any, _unlike("only what a prompt begins with is reused, not text in its middle")
    ] = None
    enable_p2p: Annotated[Any, _unlike(_SHARE)] = None
    enable_pd: Annotated[Any, _unlike(_SHARE)] = None
    enable_xpyd: Annotated[Any, _unlike(_SHARE)] = None
    enable_controller: Annotated[Any, _unlike("nothing looks up, moves or clears from outside")] = (
        None
    )
    enable_hidden_state_cache: Annotated[Any, _unlike("only keys and values are stored")] = None
    retrieve_locations: Annotated[Any, _unlike(_TIERS_ONLY)] = None
    store_location: Annotated[Any, _unlike(_TIERS_ONLY)] = None
    force_skip_save: Annotated[Any, _unlike(_TIERS_ONLY)] = None
    external_lookup_client: Annotated[Any, _unlike("tiers are asked themselves")] = None
    storage_plugins: Annotated[Any, _unlike(_PLUGINS)] = None
    external_backends: Annotated[Any, _unlike(_PLUGINS)] = None
    remote_storage_plugins: Annotated[Any, _unlike(_PLUGINS)] = None
    gds_path: Annotated[Any, _unlike(_MEDIA)] = None
    maru_path: Annotated[Any, _unlike(_MEDIA)] = None
    mp_host: Annotated[Any, _unlike("there is no server of ours; " + _SHARE)] = None
    remote_config_url: Annotated[Any, _unlike("a config is a file, or the environment")] = None


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\S+", text))


_FIRST_VERSION = ("local_device", "max_local_cache_size", "blend_recompute_ratio")
"""Keys that only files for LMCache's first version (v0) have."""
_INSIDE = frozenset(
    _words("""
    local_cpu_use_hugepages reserve_local_cpu_size local_disk_path_sharding use_layerwise
    save_decode_cache pre_caching_hash_algorithm save_unfull_chunk blocking_timeout_secs
    py_enable_gc numa_mode enable_async_loading priority_limit runtime_plugin_locations
    plugin_locations lookup_timeout_ms min_retrieve_tokens hit_miss_ratio
    lookup_server_worker_ids enable_scheduler_bypass_lookup script_allowed_imports
    run_script_api_enabled enable_lazy_memory_allocator enable_chunk_statistics enable_kv_events
    use_gpu_connector_v3 pin_timeout_sec pin_check_interval_sec app_id max_hidden_state_cpu_size
    hidden_state_layers hidden_states_retrieve_mode transfer_channel use_gds gds_path_sharding
    gds_buffer_size gds_backend maru_pool_size audit_actual_remote_url lmcache_instance_id
    mp_port controller_url controller_pull_url controller_reply_url pipelined_backend
    use_experimental ec server_url mq_timeout offload_rpc_port gpu_staging_buffer_bytes
    device_backend rocm_enable_batch_memcpy track_usage log_level disable_banner version commit
    resp_username resp_password resp_host resp_port debug config_file
""")
)
_INSIDE_BEGIN = _words("""
    blend_ p2p_ pd_ nixl_ lmcache_worker_ internal_api_server_ lazy_memory_ chunk_statistics_
    ec_ usage_track_ runtime_plugin_ plugin_ coordinator_ controller_ request_telemetry_
    aerospike_ musa_ mp_
""")
"""Settings of parts that are on or off by a setting of their own, or that are not there."""
_NAMES = [*Settings.model_fields, *_FIRST_VERSION, *sorted(_INSIDE)]
_KUBERNETES = re.compile(
    r"LMCACHE(_\w+)?_(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=.*|PORT=(tcp|udp|sctp)://.*"
    r"|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*)"
)
"""What each pod of a namespace is given for a Service whose name begins with lmcache."""
_FEATURES_OF_EXTRA = ("enable_nixl_storage", "enable_sparse")
_EXTRA_BEGIN = _words("""
    save_ nixl_ audit_ s3_ fs_ resp_ valkey_ p2p_ dax. rust_raw_block. local_cpu. lmcache_
    lmcache. remote_ hf3fs_ azure_ mooncake_ sagemaker_ controller_ kv_msg_ full_sync_ disk_
    lookup_ connection_ request_ transfer_ force_ use_ heartbeat_ gpu_ first_rank_ storage_
    internal_ disabled_ bigtable eic_ infinistore_ redis_ username password tls_ disable_ aws_
""")


def is_foreign(data: Mapping[str, Any]) -> bool:
    """Whether a file holds LMCache's keys rather than ours."""
    ours = {"tiers", "load"} & set(data)
    return not ours and any(_class(key) for key in set(map(str, data)) - {"chunk_size", "strict"})


def variable(key: str) -> str:
    """The environment variable of a key."""
    return _PREFIX + key.upper()


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings in LMCACHE_* by their keys: quotes and blanks around values are left out, and so
    are empty ones, the one that names a file, and what Kubernetes sets for a Service."""
    found = {
        name.removeprefix(_PREFIX).lower(): unquoted(value)
        for name, value in environment.items()
        if name.startswith(_PREFIX) and not _KUBERNETES.fullmatch(f"{name}={value}")
    }
    return {key: value for key, value in found.items() if value and key != "config_file"}


def switch(value: str, name: str) -> bool:
    """A variable that is on or off. Raises ConfigError."""
    try:
        return _switch(value)
    except ValueError as error:
        raise ConfigError(f"{in_environment(name)}: {error}; found {shown(value)}") from None


def refuse_beside(file: str, settings: Mapping[str, str]) -> None:
    """Variables beside a file of ours: those that say where KV goes contradict it."""
    said = sorted(variable(key) for key in settings if key in Settings.model_fields)
    if said:
        raise ConfigError(
            f"{', '.join(said)}: set beside LMCACHE_CONFIG_FILE={file}, which lists its tiers "
            "itself; keep one of the two"
        )
    _report(list(settings), set(), [], Problems({(): file}))


def not_understood(problems: Problems) -> str:
    """A line that names what was set and is not LMCache's; "" where nothing was."""
    keys = (str(path[0]) for path in problems.places if len(path) == 1)
    unknown = [_unknown(key, problems) for key in keys if not _class(key)]
    return f"\nset, and known to nobody: {', '.join(unknown)}" if unknown else ""


def translate(data: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """LMCache's settings as ours, with their places, and one line that says what became of each.

    {} where they name no place for KV, or where nothing is left of them for what is wrong.
    """
    data = {str(k): unquoted(v) if isinstance(v, str) else v for k, v in data.items()}
    data = {key: value for key, value in data.items() if value not in (None, "")}
    old = [key for key in data if key in _FIRST_VERSION]
    if old:
        problems.add(
            (old[0],),
            "is of LMCache's first version (v0), whose files are not understood; instead of "
            f"{', '.join(old)} write local_cpu and max_local_cpu_size, local_disk and "
            "max_local_disk_size, or remote_url, or tiers: as in docs/config.md",
        )
        return {}
    settings = _settings(data, problems)
    extra = [f"extra_config.{key}" for key in settings.extra_config]
    translation = _Translation(settings, problems)
    config = translation.config()
    if not problems:
        left = {f"extra_config.{key}" for key in settings.extra_config}
        taken = {key for key in extra if key not in left}
        _report([*data, *extra], taken, translation.notes, problems)
    return config


def _settings(data: Mapping[str, Any], problems: Problems) -> Settings:
    """Those that are right; the problems of all others are noted."""
    right: dict[str, Any] = {}
    for key, value in data.items():
        if key in Settings.model_fields:
            one = problems.check(Settings, {key: value}, ())
            right |= {} if one is None else {key: getattr(one, key)}
    return Settings.model_construct(**right)


class _Translation:
    """From LMCache's settings to tiers."""

    def __init__(self, settings: Settings, problems: Problems) -> None:
        self._settings, self._problems = settings, problems
        self._tiers: list[dict[str, Any]] = []
        self.notes: list[str] = []
        """What differs from LMCache, though it is used."""

    def config(self) -> dict[str, Any]:
        use_local = self._settings.use_local is not False
        if use_local and self._memory_is_on():
            self._memory()
        directories = self._settings.local_disk if use_local else []
        for directory in directories:
            self._disk(directory)
        if len(directories) > 1:
            self.notes.append(
                "each directory of local_disk is a tier, and each tier holds every chunk: "
                "a striped volume (LVM, RAID 0) would hold more"
            )
        if self._settings.use_remote is not False:
            self._remote()
        self._extra_features()
        if not self._tiers:
            return {}
        same = {"chunk_size", "strict"} & self._settings.model_fields_set
        return {"tiers": self._tiers, **{key: getattr(self._settings, key) for key in same}}

    def _memory_is_on(self) -> bool:
        settings = self._settings
        if settings.local_cpu is not None:
            return settings.local_cpu
        on = bool(settings.use_local or settings.max_local_cpu_size)
        if not on and (settings.local_disk or settings.remote_url):
            self.notes.append("no memory in front, for local_cpu is not set")
        return on

    def _memory(self) -> None:
        size = self._settings.max_local_cpu_size
        size = _MEMORY_GIB if size is None else size
        if size == 0:
            self._problems.add(("max_local_cpu_size",), "expected a size above 0 with local_cpu on")
            return
        tier = {"backend": "local_cpu", "capacity": _bytes(size)}
        if self._settings.cache_policy != "lru":
            tier["eviction"] = self._settings.cache_policy
        self._add(tier, "local_cpu", capacity="max_local_cpu_size", eviction="cache_policy")

    def _disk(self, directory: str) -> None:
        size = self._settings.max_local_disk_size
        if not size:
            name = self._spelt("max_local_disk_size", "local_disk")
            self._problems.add(("local_disk",), f"{name} (in GiB) must be set, too")
            return
        tier = {"backend": "disk", "path": directory, "capacity": _bytes(size)}
        self._add(tier, "local_disk", path="local_disk", capacity="max_local_disk_size")

    def _remote(self) -> None:
        url = self._settings.remote_url
        if not url:
            if self._settings.use_remote:
                name = self._spelt("remote_url", "use_remote")
                self._problems.add(("use_remote",), f"{name} must be set, too")
            return
        extra = self._settings.extra_config
        try:
            name, backend = backend_of(url)
            tier = backend.Options.from_lmcache(url, extra)
        except (ConfigError, ValueError) as error:
            self._problems.add(("remote_url",), masked(str(error)))
            return
        tier = {"backend": name, "serde": self._settings.remote_serde, **tier}
        self._add(tier, "remote_url", serde="remote_serde")

    def _extra_features(self) -> None:
        for key in _FEATURES_OF_EXTRA:
            if SWITCH.get(str(self._settings.extra_config.get(key)).lower()):
                self._problems.add(("extra_config", key), f"no equivalent here: {_MEDIA}")

    def _add(self, tier: dict[str, Any], key: str, **keys: str) -> None:
        """Add a tier that `key` makes; `keys`: its own keys, and LMCache's that say them."""
        path = ("tiers", len(self._tiers))
        places = self._problems.places
        places[path] = places.get((key,), key)
        places |= {(*path, ours): places[k,] for ours, k in keys.items() if (k,) in places}
        self._tiers.append(tier)

    def _spelt(self, key: str, like: str) -> str:
        """A key as it would stand where `like` does: in a file, or in the environment."""
        in_file = variable(like) not in self._problems.where((like,))
        return key if in_file else variable(key)


def backend_of(url: str) -> tuple[str, Any]:
    """The name and class of the installed backend that takes a URL. Raises ConfigError.

    One of the scheme's name is asked first, then all others, which imports them.
    """
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    names = sorted(known("backends"), key=lambda name: (not scheme.startswith(name), name))
    schemes: list[str] = []
    hints: list[str] = []
    for name in names if scheme else ():
        try:
            cls = component("backends", name)
        except ConfigError as error:
            if name == scheme:
                raise
            hints.append(masked(str(error)))
            continue
        takes = tuple(getattr(cls, "schemes", ()))
        if scheme in takes or name == scheme:
            return name, cls
        schemes += takes
    if not scheme:
        raise ConfigError(f"expected a url such as redis://host:6379; found {shown(url, 'url')}")
    understood = ", ".join(f"{each}://" for each in schemes)
    raise ConfigError(
        "; ".join([f"no equivalent for {scheme}://. Understood: {understood}", *hints])
    )


def _report(keys: list[str], taken: set[str], notes: list[str], problems: Problems) -> None:
    """One line: what is used, what is passed over, what nobody knows.

    `taken`: keys of `extra_config` that a backend took.
    """
    used = [key for key in keys if key in taken or _class(key) == "used"]
    inside = [key for key in keys if key not in used and _class(key) == "inside"]
    unknown = [_unknown(key, problems) for key in keys if key not in used and not _class(key)]
    parts = [f"used: {', '.join(used)}"] if used else []
    parts += [f"passed over, for they only tune LMCache: {', '.join(inside)}"] if inside else []
    parts += [f"passed over, for nobody knows them: {', '.join(unknown)}"] if unknown else []
    source = problems.places.get((), "environment")
    text = f"LMCache's settings ({source}): {'; '.join([*parts, *notes])}"
    if inside or unknown or notes:
        LOG.warn(text, text)
    elif parts:
        log.info("%s", text)


def _unknown(key: str, problems: Problems) -> str:
    """A name that LMCache does not know either, as it was written, and what it is close to."""
    names = _NAMES
    if problems.places.get((key,)) == in_environment(variable(key)):
        key, names = variable(key), [variable(name) for name in _NAMES]
    hint = closest(key, names).strip(",. ")
    return shown_key(key) + (f" ({hint})" if hint else "")


def _class(key: str) -> str:
    """Either "used" or "inside"; "" for what LMCache does not know either."""
    plain = key.removeprefix("extra_config.")
    if plain != key:
        return "inside" if plain.startswith(_EXTRA_BEGIN) else ""
    if key in Settings.model_fields or key in _FIRST_VERSION:
        return "used"
    return "inside" if key in _INSIDE or key.startswith(_INSIDE_BEGIN) else ""


def _bytes(gib: float) -> int:
    return int(gib * (1 << 30))
