"""What tests of the benchmarks run in processes of their own; apart, so that those start without torch."""

from __future__ import annotations

from pathlib import Path

from common import Candidate, CannotRunError


def writes(name_and_log: tuple[str, Path]) -> Candidate:
    """Write a line for each round and for what leads to it."""
    name, log = name_and_log

    def say(text: object) -> int:
        with log.open("a") as file:
            print(f"{name}:{text}", file=file)
        return 10

    return Candidate(say, {"fact": 7}, lead=lambda: say("lead"))


def is_missing(_: object) -> Candidate:
    raise ImportError("No module named 'peer'")


def cannot_run(_: object) -> Candidate:
    raise CannotRunError("its buffers take 99 GB")


def computes_something_else(_: object) -> Candidate:
    raise ValueError("its logits differ by design")
