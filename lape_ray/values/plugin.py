"""Read a user's own file of position embeddings and joins. Its text is data until somebody trusts it.

What the file adds is read from its text, without running it: names stand in dicts that are called as those of
`lape_ray.model.position`. `lape_ray.model.plugin` runs it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from lape_ray import __version__
from lape_ray.values.redaction import SECRET, redacted

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
HERE = f"Python {platform.python_version()}, lape_ray {__version__}"
PLUGIN_NAME = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
Names = Mapping[str, int]
"""Names, and the line in which each is added."""


@dataclass(frozen=True)
class Plugin:
    """The text of a file or module, as a config holds it and a checkpoint stores it.

    A stored text is not read before it is trusted: it may be of another Python, or hold a name that has become ours.

    Attributes:
        name: the path that was given, or the module's name
        version: of the distribution that the module is of; empty: it is a file
        read_by: the Python and the version of this package that took it from its file; empty: not known
    """

    name: str = ""
    version: str = ""
    sha256: str = ""
    text: str = ""
    read_by: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.sha256 != _sha256(self.text) or not f"{self.name}{self.version}{self.read_by}".isprintable():
            raise ValueError(f"the plugin {self.name!r} is damaged: its text is not the one of its sha256")

    def __str__(self) -> str:
        """Write it as an option takes it, and as a file with exactly this text."""
        return f"{self.name}@sha256:{self.sha256}"

    __repr__ = __str__

    @property
    def identity(self) -> str:
        """Return what is equal for two plugins that do the same, wherever they lie."""
        return f"{self.version} sha256:{self.sha256}".strip()

    @property
    def way_out(self) -> str:
        """Return how to use a text that cannot be used here; empty: it was read here, and its file can be changed."""
        by = self.read_by or "an earlier version"
        return "" if by == HERE else f"use what it was stored by: {by}"

    @property
    def tables(self) -> Mapping[str, Names]:
        """Return the names of each dict in the text; a ValueError where it is no Python, or adds nothing."""
        try:
            return _tables(self.name, self.text)
        except ValueError as error:
            raise ValueError("; ".join(filter(None, (str(error), self.way_out)))) from None

    def names(self, of: str) -> Names:
        """Return the names for a field of the model."""
        return {name: line for table in TABLES[of] for name, line in self.tables.get(table, {}).items()}


class TrustedPlugin(Plugin):
    """A plugin that the user has named, or trusts; no stored one is read as this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.tables

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
        plugin = cls(name, version, _sha256(text), text, HERE)
        if found := next(_secrets(text), None):
            line, what = found
            raise ValueError(
                f"{name}, line {line}: {what} seems to hold a password or token, which would be stored with the run; "
                "take it out, or choose another name if it is none"
            )
        return plugin


def trusted(stored: Plugin | None, given: Plugin | Literal["trust"] | None) -> Plugin | None:
    """Return the plugin that a checkpoint's network is built with: the `stored` one, if what was `given` allows it.

    Raises:
        ValueError: nothing was given, or another text; or the stored one cannot be read here.
    """
    if stored is None:
        return None if given == TRUST else given
    if given == TRUST:
        return TrustedPlugin(**vars(stored))
    if given is None:
        raise ValueError(
            f"{refusal(stored)}, or --trust-plugin if you know who wrote it (docs/positions.md says how to read it)"
        )
    if given.identity != stored.identity:
        raise ValueError(
            f"it was trained with {stored}{stored.version and ' of '}{stored.version}, and not with {given}: give that "
            "text with --model.plugin, or --trust-plugin alone to run the one that is stored in it"
        )
    return replace(given, read_by=stored.read_by)


def refusal(plugin: Plugin) -> str:
    """Say why a plugin is not run, and how every command can run it."""
    return (
        f"its network is made by code that is stored with it, {plugin}, which is not run unasked: give the same file "
        "with --model.plugin"
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
    file = Path(str(spec.origin))
    return _versions(first, file) or first, file


def _versions(package: str, file: Path) -> str:
    """Return name and version of the distributions that hold a package's file, else of all that hold the package.

    One may be listed twice, and spelled in two ways, where its egg-info lies beside its dist-info.
    """
    found = {}
    for spelled in importlib.metadata.packages_distributions().get(package, ()):
        found[re.sub(r"[-_.]+", "-", spelled).lower()] = importlib.metadata.distribution(spelled)
    own = {
        name: each
        for name, each in found.items()
        if any(Path(str(each.locate_file(part))) == file for part in each.files or ())
    }
    return " ".join(f"{name} {each.version}" for name, each in sorted((own or found).items()))


def _secrets(text: str) -> Iterator[tuple[int, str]]:
    """Find what looks like a password in a Python text: its line, and what it is called or the line without it."""
    for number, line in enumerate(text.splitlines(), 1):
        words = [word for word in line.split() if "://" in word]
        if any(redacted(word) != word for word in words):
            yield number, repr(redacted(line).strip())
    for node in ast.walk(ast.parse(text)):
        for target, value in _assigned(node):
            name = _last_name(target)
            if SECRET.search(name) and _holds_text(value):
                yield value.lineno, name


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr | str, ast.expr]]:
    """Yield what a node gives to a name: by assignment, in a dict or a call, or as an argument's default."""
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    yield from zip(target.elts, value.elts, strict=False)
                yield target, value
        case (
            ast.AnnAssign(target=target, value=ast.expr() as value)
            | ast.NamedExpr(target=target, value=value)
        ):
            yield target, value
        case ast.keyword(arg=str(name), value=value):
            yield name, value
        case ast.Dict(keys=keys, values=values):
            yield from ((key, value) for key, value in zip(keys, values, strict=True) if key is not None)
        case ast.Call(func=ast.Attribute(attr="setdefault" | "putenv"), args=[name, value]):
            yield name, value
        case ast.arguments():
            plain = [*node.posonlyargs, *node.args]
            yield from (
                (each.arg, value) for each, value in zip(plain[::-1], node.defaults[::-1], strict=False)
            )
            named = zip(node.kwonlyargs, node.kw_defaults, strict=True)
            yield from ((each.arg, value) for each, value in named if value is not None)


def _last_name(target: ast.expr | str) -> str:
    match target:
        case str(name) | ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return name
        case ast.Subscript(slice=key):
            return _last_name(key)
    return ""


def _holds_text(value: ast.AST) -> bool:
    """Tell whether a value is text that is written out, or is put together of some."""
    if isinstance(value, ast.Constant):
        return isinstance(value.value, str | bytes) and bool(value.value)
    joined = isinstance(value, ast.JoinedStr | ast.BinOp | ast.BoolOp | ast.IfExp)
    return joined and any(map(_holds_text, ast.iter_child_nodes(value)))


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
            f"{file}, line {error.lineno}: {error.msg}: {redacted((error.text or '').strip())!r}"
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
        if not (isinstance(name, str) and PLUGIN_NAME.fullmatch(name)):
            raise ValueError(
                f"{file}, line {line}: {target.id} must be a dict whose names are written out, of letters, digits and "
                f'_, as in {target.id} = {{"my_own": MyOwn}}'
            )
        if name in names or name in others:
            raise ValueError(f"{file}, line {line}: {name!r} is there twice; give one of them another name")
        names[name] = line
    return names
