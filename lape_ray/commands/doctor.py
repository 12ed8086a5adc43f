"""Say what of a run's needs works on this machine, and how to mend what does not.

A line for each, within 20 seconds: ok, FAIL with its fix, or - for what is not there and no run on this machine needs.
The exit code is 1 where a line says FAIL. No secret is shown.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from lape_ray.commands.checks import AbsentError, BrokenError, checks
from lape_ray.values.redaction import first_line

LIMIT_S = 18.0


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--storage",
        metavar="ADDRESS",
        help="folder or s3:// address of runs, to write a small file in and delete it",
    )
    add("--tracking.uri", dest="uri", metavar="URI", help="MLflow server (default: what a run would take)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print a line for each check; returns 1 where one fails."""
    options = build_parser(prog).parse_args(argv)
    failed = False
    for name, mark, text in examine(checks(options.storage, options.uri), LIMIT_S):
        print(f"{mark:4}  {name:13}  {text}", flush=True)
        failed |= mark == "FAIL"
    return int(failed)


def examine(asked: Mapping[str, Callable[[], str]], limit_s: float) -> Iterator[tuple[str, str, str]]:
    """Run all checks at once; yield name, mark and text of each, in their order, as soon as those before are there.

    A check that takes longer than `limit_s` seconds has failed. It is left to itself, and ends with the process.
    """
    deadline = time.monotonic() + limit_s
    found: dict[str, queue.SimpleQueue[tuple[str, str]]] = {name: queue.SimpleQueue() for name in asked}
    for name, check in asked.items():
        threading.Thread(
            target=lambda name=name, check=check: found[name].put(_outcome(check)), daemon=True
        ).start()
    for name, outcome in found.items():
        try:
            mark, text = outcome.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            mark, text = (
                "FAIL",
                f"no answer within {limit_s:g} s; fix: ask again when the machine has less to do",
            )
        yield name, mark, text


def _outcome(check: Callable[[], str]) -> tuple[str, str]:
    try:
        return "ok", check()
    except AbsentError as absent:
        return "-", str(absent)
    except BrokenError as broken:
        return "FAIL", f"{first_line(broken)}; fix: {broken.fix}"
    except Exception as error:  # a check that fails says something about the machine, too
        return (
            "FAIL",
            f"{type(error).__name__}: {first_line(error)}; fix: make setup installs all that is needed",
        )
