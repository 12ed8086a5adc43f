"""The command line of every job: a recipe, then any field of the config. Standard library only."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import itertools
import logging
import os
import shlex
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from lape_ray.config import (
    NAMES,
    SECTIONS,
    TrainConfig,
    did_you_mean,
    dump,
    parse_value,
    replace_fields,
    type_name,
)
from lape_ray.recipes import RECIPES, recipe
from lape_ray.values.plugin import TRUST, TrustedPlugin
from lape_ray.values.redaction import redacted


def _value_type(kind: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return parse_value(kind, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def at_least_one(text: str) -> int:
    """Parse `text` as a whole number of one or more; for an option's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Parse `10,20` as whole numbers of one or more; for an option's `type`."""
    return tuple(at_least_one(part) for part in text.split(","))


class ConfigParser(argparse.ArgumentParser):
    """A parser with one `--section.field` for every field of the config, in groups, with types and help.

    Errors are one line, which names the nearest option where one is not known.
    """

    def __init__(
        self, *, usage: str, description: str | None = None, epilog: str = "", prog: str | None = None
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for section, cls in SECTIONS.items():
            group = self.add_argument_group(f"{section} ({(cls.__doc__ or '').splitlines()[0]})")
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                group.add_argument(
                    f"--{section}.{field.name}",
                    type=_value_type(hints[field.name]),
                    metavar=type_name(hints[field.name]),
                    default=argparse.SUPPRESS,
                    help=f"{field.metadata['help']} (default: {field.default})".replace("%", "%%"),
                )

    def add_trust(self) -> None:
        """Add the option by which a checkpoint's own plugin is run."""
        self.add_argument(
            "--trust-plugin",
            dest="model.plugin",
            action="store_const",
            const=TRUST,
            default=argparse.SUPPRESS,
            help="run the code that a checkpoint holds for its position embeddings (model.plugin)",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as every parser does; a help beside `--model.plugin` lists the names that it adds."""
        words = list(sys.argv[1:] if args is None else args)
        if {"-h", "--help"} & {*words}:
            for word, next_word in itertools.pairwise([*words, ""]):
                option, _, value = word.partition("=")
                if option == "--model.plugin":
                    self._add_names(value or next_word)
        return super().parse_known_args(words, namespace)

    def _add_names(self, of_plugin: str) -> None:
        try:
            plugin = TrustedPlugin.read(of_plugin)
        except ValueError as error:
            self.error(str(error))
        for of in NAMES:
            action = self._option_string_actions[f"--model.{of}"]
            action.metavar = "|".join((str(action.metavar), *plugin.names(of)))

    def parse_job(self, argv: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parse a command line to the job's options and to the overrides of the config that it gives."""
        values = vars(self.parse_args(argv))
        overrides = {name: values.pop(name) for name in list(values) if "." in name}
        return values, overrides

    def error(self, message: str) -> NoReturn:
        unknown, _, names = message.partition("unrecognized arguments: ")
        if not unknown and names:
            name = names.split()[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"{name} is no option{did_you_mean(name, known)}"
        self.exit(2, f"error: {redacted(message)} (--help lists everything)\n")


def recipe_parser(description: str | None, prog: str | None = None) -> ConfigParser:
    """Make a parser of `RECIPE [--section.field VALUE ...] [--dump]`."""
    recipes = "\n".join(
        f"  {name:28} {(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items()
    )
    usage = "%(prog)s RECIPE [--section.field VALUE ...] [--dump]"
    parser = ConfigParser(usage=usage, description=description, epilog=f"recipes:\n{recipes}", prog=prog)
    parser.add_argument("recipe", help="name of a recipe, see below")
    parser.add_argument("--dump", action="store_true", help="print the resulting config and exit")
    return parser


def parse(argv: Sequence[str] | None, *, description: str | None, prog: str | None = None) -> TrainConfig:
    """Parse a command line to the config that it asks for: `RECIPE [--section.field VALUE ...]`.

    `--dump` prints it and exits. Bad input ends the process with one line and exit code 2.
    """
    parser = recipe_parser(description, prog)
    values = vars(parser.parse_args(argv))
    name, only_dump = values.pop("recipe"), values.pop("dump")
    try:
        config = replace_fields(recipe(name), values)
    except ValueError as error:
        parser.exit(2, f"error: {redacted(str(error))}\n")
    if only_dump:
        print(dump(config), end="")
        parser.exit(0)
    return config


def typed_command() -> str:
    """Return the command that started this process, as a person types it."""
    program = Path(sys.argv[0])
    return shlex.join(
        [*(["lape-ray"] if program.name == "lape-ray" else ["python", sys.argv[0]]), *sys.argv[1:]]
    )


def run_job(job: Callable[[], int | None]) -> NoReturn:
    """Run a job's main function, and end the process with its `exit_code`.

    The interpreter is left without taking its modules apart, which takes 1.4 s of torch and MLflow; not so where a
    person types into it (`%run` of IPython, `python -i`), whose session goes on.
    """
    code = [1]
    if not hasattr(sys, "ps1") and not sys.flags.interactive:
        atexit.register(_leave, code)  # before all others, so that it is called after them
    code[0] = exit_code(job)
    sys.exit(code[0])


class _Dropping:
    """A stream that drops what cannot be written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


@contextlib.contextmanager
def printing_cannot_fail() -> Iterator[None]:
    """Drop lines that cannot be printed: they must not end a training whose `| head` has left, or whose log is full."""
    with contextlib.ExitStack() as stack:
        for stream, redirect in (
            (sys.stdout, contextlib.redirect_stdout),
            (sys.stderr, contextlib.redirect_stderr),
        ):
            if stream is not None:  # it was closed before Python started
                stack.enter_context(redirect(cast(TextIO, _Dropping(stream))))
        yield


def _leave(code: Sequence[int]) -> NoReturn:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code[0])


def exit_code(job: Callable[[], int | None]) -> int:
    """Run a job's main function; what a user can cause becomes one line and an exit code, not a traceback.

    The code is 2, or the `exit_code` of an error that has one; 1 after a traceback, 130 after Ctrl-C. No line shows a
    password that stands in an address.
    """
    try:
        return job() or 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        _say(f"{end.code}\n")
        return 1
    except KeyboardInterrupt:
        _say("interrupted\n")
        return 130
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) and not hasattr(error, "exit_code"):
            _say(redacted(traceback.format_exc()))
            return 1
        _say(f"error: {redacted(str(error))}\n")
        code: int = getattr(error, "exit_code", 2)
        return code


def _say(text: str) -> None:
    """Print to the standard error; the exit code tells it all the same where nobody reads that."""
    with printing_cannot_fail():
        print(text, end="", file=sys.stderr, flush=True)
