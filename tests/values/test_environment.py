"""Environment variables for as long as a block lasts."""

from __future__ import annotations

import os

import pytest

from lape_ray.values.environment import environment


def test_variables_are_as_they_were_whatever_the_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPE_A", "old")
    monkeypatch.delenv("LAPE_B", raising=False)
    with pytest.raises(KeyError), environment({"LAPE_A": "new", "LAPE_B": "new"}):
        assert (os.environ["LAPE_A"], os.environ["LAPE_B"]) == ("new", "new")
        del os.environ["LAPE_B"]
        raise KeyError
    assert (os.environ["LAPE_A"], os.environ.get("LAPE_B")) == ("old", None)
