"""YAML that remembers on which line each value stands, and refuses a key that stands twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lmcache_core.errors import ConfigError
from lmcache_core.plugins.secrets import masked, shown_key

KeyPath = tuple[str | int, ...]


def read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The mapping in a file, and "file:line" for each key path. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        places: dict[KeyPath, str] = {(): str(path)}
        _walk(node, (), str(path), places)
        data = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {_told(error.problem)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {masked(str(error))}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{path}:1: expected keys such as chunk_size and tiers; found {found}")
    return data, places


def _told(problem: str | None) -> str:
    """What the parser says, without the file's own words, which may be secrets."""
    return re.sub(r"'(?!<)[^']{2,}'", "***", problem or "")


def _walk(node: Any, path: KeyPath, file: str, places: dict[KeyPath, str]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*path, index)] = f"{file}:{item.start_mark.line + 1}"
            _walk(item, (*path, index), file, places)
    if not isinstance(node, yaml.MappingNode):
        return
    own: dict[object, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{file}:{line}: expected a name before the colon; found a {key.id}")
        if key.value in own:
            first = own[key.value]
            name = shown_key(str(key.value))
            raise ConfigError(f"{file}:{line}: {name} stands here and on line {first}")
        own[str(key.value)] = line
        places[(*path, str(key.value))] = f"{file}:{line}"
        _walk(value, (*path, str(key.value)), file, places)
