"""Blame: what an exception of somebody else's code says, and where it comes from.

Plugins, stores and their clients raise anything, also what fails when it is asked for its text.
"""

from __future__ import annotations

import inspect
import signal
import traceback
from types import FunctionType, MethodType
from typing import Any

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
    """For an author: the name of a class or function, and file and line of what raised; or of the
    method whose result was wrong, where nothing of its file is in the traceback. Never raises."""
    thing: Any = component
    if not isinstance(component, type | FunctionType | MethodType):
        thing = type(component)
    name = f"{thing.__module__}.{thing.__qualname__}"
    try:
        file, line = _definition(getattr(thing, method, thing))
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == file and frame.lineno:
                line = frame.lineno
    except BaseException:  # without a file, as what is built in
        return name
    return f"{name} ({file}:{line})"


def is_the_process_own(error: BaseException) -> bool:
    """Whether an exception that came out of somebody else's code, on a thread of an engine's, is
    none of that code's: Ctrl-C, or what a signal's handler raised in the middle of it."""
    if isinstance(error, KeyboardInterrupt):
        return True
    handlers = {getattr(signal.getsignal(n), "__code__", None) for n in signal.valid_signals()}
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code in handlers for frame, _ in frames)


def _definition(thing: Any) -> tuple[str, int]:
    code = getattr(inspect.unwrap(thing), "__code__", None)
    if code is not None:
        return code.co_filename, code.co_firstlineno
    return inspect.getsourcefile(thing) or "", inspect.getsourcelines(thing)[1]
