"""Scripts by which a shell completes the command line: subcommands, options, recipes, and values of fields.

All words are in the script, so that a completion starts no Python:

    source <(lape-ray --completion bash)      # in ~/.bashrc; for zsh in ~/.zshrc, behind compinit
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lape_ray.config import SECTIONS, words_beside
from lape_ray.recipes import RECIPES

_TEMPLATE = """\
_lape_ray() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="@SUBCOMMANDS@"
  else
    case "${COMP_WORDS[1]} $before" in
@VALUES@
    esac
    if [ -z "$words" ]; then
      case "${COMP_WORDS[1]}" in
@OPTIONS@
      esac
    fi
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _lape_ray lape-ray
"""


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script for `bash` or `zsh` that completes the subcommands of these parsers."""
    values = [line for name, parser in parsers.items() for line in _values(name, parser)]
    values += [f"      *' --{field}') words='{' '.join(words)}';;" for field, words in field_values()]
    options = [f"        {name}) words='{' '.join(_options(parser))}';;" for name, parser in parsers.items()]
    text = _TEMPLATE.replace("@SUBCOMMANDS@", " ".join([*parsers, "--completion", "--help", "--version"]))
    text = text.replace("@VALUES@", "\n".join(values)).replace("@OPTIONS@", "\n".join(options))
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """List the options of a subcommand; where a recipe's name may stand, the recipes too."""
    takes_recipe = any(action.dest == "recipe" and not action.option_strings for action in parser._actions)
    long = [
        option for action in parser._actions for option in action.option_strings if option.startswith("--")
    ]
    return [*(RECIPES if takes_recipe else ()), *long]


def _values(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the cases of a subcommand's own options that take one of some words."""
    for action in parser._actions:
        choices = RECIPES if action.dest == "recipe" and action.option_strings else action.choices
        if choices and action.option_strings:
            words = " ".join(map(str, choices))
            yield f"      '{name} {action.option_strings[-1]}') words='{words}';;"


def field_values() -> Iterator[tuple[str, list[str]]]:
    """Yield the fields of the config that take one of some words, with these."""
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if words := _words(hints[field.name]):
                yield f"{section}.{field.name}", words


def _words(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if kind is type(None):
        return ["none"]
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        known = [_words(part) for part in words_beside(typing.get_args(kind))]
        return [word for words in known for word in words] if all(known) else []
    return []
