"""Read a user's own file of position embeddings and joins. Its text is data until somebody trusts it.

What the file adds is read from its text, without running it: names stand in dicts that are called as those of
`lape_ray.model.position`. `lape_ray.model.plugin` runs it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from lape_ray.values.redaction import redacted

TABLES = {
    "position": ("ABSOLUTES", "CONDITIONALS"),
    "join": ("JOINS",),
    "bias": ("BIASES", "CONTENT_BIASES"),
    "bias_join": ("BIAS_JOINS",),
    "rotary": ("ROTARIES",),
}
"""The dicts of a plugin, by the field of the model that their names are for."""
TRUST: Literal["trust"] = "trust"
"""In the place of a plugin: the one that is stored with a checkpoint, whatever it is."""
CHARACTERS = 200_000
_NAME = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
Names = Mapping[str, int]
"""Names, and the line in which each is added."""


@dataclass(frozen=True)
class Plugin:
    """The text of a file or module, as a config holds it and a checkpoint stores it.

    Attributes:
        name: the path that was given, or the module's name
        version: of the distribution that the module is of; empty: it is a file
    """

    name: str = ""
    version: str = ""
    sha256: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        if self.sha256 != _sha256(self.text) or not self.name.isprintable():
            raise ValueError(f"the plugin {self.name!r} is damaged: its text is not the one of its sha256")
        _tables(self.name, self.text)

    def __str__(self) -> str:
        """Write it as an option takes it, and as a file with exactly this text."""
        return f"{self.name}@sha256:{self.sha256}"

    __repr__ = __str__

    @property
    def identity(self) -> str:
        """Return what is equal for two plugins that do the same, wherever they lie."""
        return f"{self.version} sha256:{self.sha256}".strip()

    @property
    def tables(self) -> Mapping[str, Names]:
        """Return the names of each dict in the text."""
        return _tables(self.name, self.text)

    def names(self, of: str) -> Names:
        """Return the names for a field of the model."""
        return {name: line for table in TABLES[of] for name, line in self.tables.get(table, {}).items()}


class TrustedPlugin(Plugin):
    """A plugin that the user has named, or trusts; no stored one is read as this."""

    @classmethod
    def read(cls, given: str) -> TrustedPlugin:
        """Read the file `given`.py or the installed module `given`, both perhaps with @sha256:... behind.

        Raises:
            ValueError: there is none, it has another sha256, adds nothing, or holds a password.
        """
        name, _, digest = given.partition("@sha256:")
        version, file = ("", Path(name)) if name.endswith(".py") else _installed(name)
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{name} cannot be read: {why}; give the path of a Python file, or the name of an installed module"
            ) from None
        if digest not in ("", _sha256(text)):
            raise ValueError(
                f"{name} has sha256 {_sha256(text)} and not {digest}: put the file back as it was, or leave out "
                "what stands behind @"
            )
        if len(text) > CHARACTERS:
            raise ValueError(
                f"{name} has more than {CHARACTERS:,} characters, which every checkpoint would store"
            )
        for number, line in enumerate(text.splitlines(), 1):
            if (shown := redacted(line)) != line:
                raise ValueError(
                    f"{name}, line {number}: {shown.strip()!r} seems to hold a password or token, which would be "
                    "stored with the run; take it out"
                )
        return cls(name, version, _sha256(text), text)


def trusted(stored: Plugin | None, given: Plugin | Literal["trust"] | None) -> Plugin | None:
    """Return the plugin that a checkpoint's network is built with: the `stored` one, if what was `given` allows it.

    Raises:
        ValueError: nothing was given, or another text.
    """
    if stored is None:
        return None if given == TRUST else given
    if given == TRUST:
        return TrustedPlugin(**vars(stored))
    if given is None:
        raise ValueError(refusal(stored))
    if given.identity != stored.identity:
        raise ValueError(
            f"it was trained with {stored}{stored.version and ' of '}{stored.version}, and not with {given}: give that "
            "text with --model.plugin, or --trust-plugin alone to run the one that is stored in it"
        )
    return given


def refusal(plugin: Plugin) -> str:
    """Say why a plugin is not run, and how it would be."""
    return (
        f"its network is made by code that is stored with it, {plugin}, which is not run unasked: give the same file "
        "with --model.plugin, or --trust-plugin if you know who wrote it (docs/positions.md says how to read it)"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _installed(name: str) -> tuple[str, Path]:
    """Find the version and the source of a module; imports nothing."""
    first, *inner = name.split(".")
    spec = importlib.util.find_spec(first) if first.isidentifier() else None
    for part in inner:
        places = None if spec is None else spec.submodule_search_locations
        spec = None if places is None or spec is None else PathFinder.find_spec(f"{spec.name}.{part}", places)
    if spec is None or not (spec.origin or "").endswith(".py"):
        raise ValueError(
            f"there is no module {name} with its source here; give the path of a Python file, which ends with .py, or "
            "install the module's package"
        )
    of = importlib.metadata.packages_distributions().get(first, ())
    version = " ".join(f"{each} {importlib.metadata.version(each)}" for each in of)
    return version or first, Path(str(spec.origin))


@lru_cache(maxsize=16)
def _tables(file: str, text: str) -> Mapping[str, Names]:
    """Read the dicts of `TABLES` in a text: name -> line.

    Raises:
        ValueError: it is no Python, adds nothing, or a name is not written out or twice there.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ValueError(
            f"{file}, line {error.lineno}: {error.msg}: {(error.text or '').strip()!r}"
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file} is no Python: {error}") from None
    known = {table: kind for kind, tables in TABLES.items() for table in tables}
    found: dict[str, dict[str, int]] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id in known:
                others = {name for table in TABLES[known[target.id]] for name in found.get(table, ())}
                found[target.id] = _names(file, target, getattr(node, "value", None), others)
    if not any(found.values()):
        raise ValueError(
            f'{file} adds nothing: it needs a dict such as JOINS = {{"my_join": MyJoin}}, or one of '
            f"{', '.join(known)}"
        )
    return found


def _names(file: str, target: ast.Name, value: ast.expr | None, others: set[str]) -> dict[str, int]:
    names: dict[str, int] = {}
    for key in value.keys if isinstance(value, ast.Dict) else [None]:
        name = key.value if isinstance(key, ast.Constant) else None
        line = target.lineno if key is None else key.lineno
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ValueError(
                f"{file}, line {line}: {target.id} must be a dict whose names are written out, of letters, digits and "
                f'_, as in {target.id} = {{"my_own": MyOwn}}'
            )
        if name in names or name in others:
            raise ValueError(f"{file}, line {line}: {name!r} is there twice; give one of them another name")
        names[name] = line
    return names
