"""python -m tests.soak [--minutes 25] [--loads 1000000] [--seed N]: `make soak`.

Ends with a table, and with status 1 where a byte was wrong, a call raised, a worker died or did not
end, or memory, threads or descriptors grew.
"""

from __future__ import annotations

import argparse
import random
import sys

from tests.soak.soak import WORLDS, soak


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=25.0, help="at most")
    parser.add_argument("--loads", type=int, default=1_000_000, help="chunks to compare")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--tiers", choices=WORLDS, action="append", help="only these")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    report = soak(
        60 * options.minutes,
        options.loads,
        options.seed,
        options.tiers or tuple(WORLDS),
        lambda line: print(line, flush=True),
    )
    print(report.table())
    return 1 if report.trouble else 0


if __name__ == "__main__":
    sys.exit(main())
