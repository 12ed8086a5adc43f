"""The secrets: variables by their names, passwords and tokens inside addresses. Standard library only.

A secret stays in the environment of the processes that need it. No config, record, command line, runtime environment
of Ray or printed line holds one: Ray and MLflow keep all of these, and show them.
"""

from __future__ import annotations

import os
import re

SECRET = re.compile(
    "SECRET|PASS(?!FILE)|PWD|TOKEN|CREDENTIAL|SIGNATURE|^SIG$|(ACCESS|API|PRIVATE|ENCRYPTION)_?KEY",
    re.IGNORECASE,
)  # in the name of a variable, or of a parameter in an address
_DATABASES = r"(?:postgres|mysql|mariadb|mssql|oracle|cockroachdb)[a-z0-9+_]*://"
_START = rf"(?<![a-z0-9+.-])(?!{_DATABASES})([a-z][a-z0-9+.-]*://)"
_SLASHED = r"[^\s/?#@:\[]*:(?!\d*(?:[/?#]|$))\S*"  # a password with a slash in it, where no port could stand
_DATABASE = re.compile(rf"(?<![a-z0-9+.-])({_DATABASES}[^\s/:@]*):\S*@", re.IGNORECASE)
_ACCOUNT = re.compile(rf"{_START}(?:[^\s/?#]*|{_SLASHED})@", re.IGNORECASE)
_PARAMETER = re.compile(r"([?&;#])([^=&;#?\s]+)=([^&;#\s'\"]+)")
_SERVER = re.compile("_PROXY$|ENDPOINT", re.IGNORECASE)
"""In the name of a variable whose address is a server's also without a scheme, and no path."""
SHARED = ("AWS_", "HF_", "MLFLOW_", "LAPE_RAY_")
_INSTEAD = {
    "http": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN,",
    "postgresql": "PGPASSWORD, or a file ~/.pgpass,",
    "mysql": "an option file, named by ?read_default_file=FILE behind the address,",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,",
}


def redacted(text: str) -> str:
    """Return `text` with addresses that hold no password and no token any more.

    An account goes as a whole, for a token may stand in the place of the name; a database keeps the name of its user.
    Parameters such as `?token=` keep their name.
    """

    def parameter(match: re.Match[str]) -> str:
        mark, name, _ = match.groups()
        return f"{mark}{name}=***" if SECRET.search(name) else match[0]

    return _PARAMETER.sub(parameter, _DATABASE.sub(r"\1@", _ACCOUNT.sub(r"\1", text)))


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, redacted; its kind where it says nothing."""
    return redacted(next(iter(str(error).strip().splitlines()), type(error).__name__))


def refuse_secret(name: str, address: str | None) -> None:
    """Refuse an address with a password or token in it.

    Args:
        name: of the option or variable that holds the address, for the error.

    Raises:
        ValueError: names the variables to use instead, and not the secret.
    """
    whole = _with_scheme(name, re.sub(r"\s", "+", address or ""))  # a database's password may have spaces
    shown = redacted(whole)
    if shown == whole:
        return
    known = "s3" if name.startswith("AWS_") else whole.lower()
    kind = next((kind for kind in _INSTEAD if known.startswith(kind)), "")
    way_out = f"set {_INSTEAD[kind]} in the environment of every node" if kind else "leave it out"
    raise ValueError(
        f"{name}={shown!r} was given with a password or token in it, which would be stored and shown with the run; "
        f"{way_out}, and give the address alone"
    )


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable holds a secret: by its name, or as an address with a password."""
    value = _with_scheme(name, value)
    return bool(SECRET.search(name)) or redacted(value) != value


def _with_scheme(name: str, address: str) -> str:
    return f"http://{address}" if _SERVER.search(name) and "://" not in address else address


def shared_variables() -> dict[str, str]:
    """Return what of this process's environment the other processes of a run need and anybody may see."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(SHARED) and not is_secret(name, value)
    }
