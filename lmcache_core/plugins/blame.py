"""Blame: what an exception of somebody else's code says, and where it comes from.

Plugins, stores and their clients raise anything, also what fails when it is asked for its text.
"""

from __future__ import annotations

import inspect
import traceback

from lmcache_core.plugins.secrets import masked

_LONGEST = 500
"""Characters of a cause that are shown."""


def cause(error: BaseException) -> str:
    """What an exception says, on one line and without secrets; never raises."""
    kind = type(error).__name__
    try:
        text = " ".join(masked(str(error) or repr(error)).split())
    except BaseException:  # its author's mistake, too
        return f"{kind} without a text"
    if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
        text = f"{kind}({text})" if kind not in text else text  # "3" alone says little
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def culprit(error: BaseException, component: object, method: str = "") -> str:
    """For a component's author: its class, and file and line of what raised; or of the method
    whose result was wrong, where nothing of the component's is in the traceback. Never raises."""
    kind = component if inspect.isclass(component) else type(component)
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        file, line = _definition(getattr(kind, method, kind))
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == file and frame.lineno:
                line = frame.lineno
    except BaseException:  # code without a file, say
        return name
    return f"{name} ({file}:{line})"


def _definition(thing: object) -> tuple[str, int]:
    code = getattr(inspect.unwrap(thing) if callable(thing) else thing, "__code__", None)
    if code is not None:
        return code.co_filename, code.co_firstlineno
    file = inspect.getsourcefile(thing) or ""  # type: ignore[arg-type]
    return file, inspect.getsourcelines(thing)[1]  # type: ignore[arg-type]
