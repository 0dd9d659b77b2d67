"""python leash.py COMMAND...: runs it, and kills it with all that it started when stdin ends.

So no engine outlives its tests, even where these were killed. SIGTERM is passed on to the command
alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: command.terminate())
    threading.Thread(target=_watch, daemon=True).start()
    status = command.wait()
    return status if status >= 0 else 128 - status


def _watch() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
