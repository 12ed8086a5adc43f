"""The console's entry point: lape-ray SUBCOMMAND [options]."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from lape_ray import __version__
from lape_ray.cli import run_job

SUBCOMMANDS = ("train", "tune", "write-data", "evaluate", "predict", "export", "report", "demo", "doctor")


def subcommand(name: str) -> ModuleType:
    """Import the module of a subcommand, which has `build_parser` and `main`."""
    return importlib.import_module(f"lape_ray.commands.{name.replace('-', '_')}")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of a command line without subcommand."""
    lines = [f"  {name:12} {(subcommand(name).__doc__ or '').splitlines()[0]}" for name in SUBCOMMANDS]
    parser = argparse.ArgumentParser(
        prog="lape-ray",
        usage="%(prog)s SUBCOMMAND [options], or %(prog)s SUBCOMMAND --help",
        description="Distributed training of vision transformers whose position embedding is the subject.",
        epilog="subcommands:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subcommand", metavar="SUBCOMMAND", choices=SUBCOMMANDS, help="see below")
    parser.add_argument(
        "--completion", choices=("bash", "zsh"), help="print a script that completes for that shell"
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the subcommand that the command line names; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    name = words[0] if words else "--help"
    if name in SUBCOMMANDS:
        code: int | None = subcommand(name).main(words[1:], f"lape-ray {name}")
        return code
    if name.startswith("--completion"):
        from lape_ray.commands.completion import script

        build_parser().parse_args(
            [SUBCOMMANDS[0], *words]
        )  # which shell, or an error that says which there are
        parsers = {name: subcommand(name).build_parser() for name in SUBCOMMANDS}
        print(script(words[-1].rpartition("=")[2], parsers), end="")
        return 0
    build_parser().parse_args([name, *words[1:]])
    return 0


def run() -> None:
    """Run the command line of this process, and end it."""
    run_job(main)
