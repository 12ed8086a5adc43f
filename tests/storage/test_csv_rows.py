"""A spreadsheet runs nothing of what the CSV files hold, and what was written can be had back."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from lape_ray.inference.predict import Prediction, with_csv
from lape_ray.storage.csv_rows import inert, write_rows

RUN = (
    "=1+1", "=HYPERLINK(\"http://x\",\"y\")", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=", "-", "--1",
    "+cmd|' /C calc'!A0", "＝1+1", "＋1", "－1", "＠x", "'=1", "'", "-1\n", "+1,=2", "-x.png", "=a\r\nb",
)  # fmt: skip
KEPT = (
    "", "jay", "a=b", " =1", "-1", "+1.5", "-.5", "-1e-05", "+2E+10", "a\nb", "a\r\n=b", "a,b", 'a"b', 'a",=1,"b',
    "caf\xe9", "0.750000", "n01440764",
)  # fmt: skip


@pytest.mark.parametrize("cell", RUN)
def test_a_formula_gets_an_apostrophe(cell: str) -> None:
    assert inert(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", KEPT)
def test_other_text_and_numbers_stay(cell: str) -> None:
    assert inert(cell) == cell
    for number in (-1, -0.5, float("-inf"), None, True):
        assert inert(number) is number


def test_rows_come_back_as_they_were() -> None:
    rows = [[first, second] for first in (*RUN, *KEPT) for second in (*RUN, *KEPT)]
    stream = io.StringIO(newline="")
    write_rows(stream, rows)
    stream.seek(0)
    read = list(csv.reader(stream, strict=True))
    assert [[cell.removeprefix("'") for cell in row] for row in read] == rows
    dangerous = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
    assert {cell for row in read for cell in row if cell.startswith(dangerous)} == {
        "-1", "+1.5", "-.5", "-1e-05", "+2E+10"
    }  # fmt: skip


def test_the_predictions_of_hostile_names_are_inert(tmp_path: Path) -> None:
    name = "=cmd|' /C calc'!A0\n@x.png"
    one = Prediction(Path(name), (("=1+1", 0.5), ("-jay\tx", 0.25)))
    bad = Prediction(Path("-torn.png"), error="-torn.png cannot be read: it is\r\nempty")
    assert len(list(with_csv([one, bad], tmp_path / "out.csv", top=2))) == 2
    with (tmp_path / "out.csv").open(newline="") as stream:
        _, first, second = csv.reader(stream, strict=True)
    assert first == [f"'{name}", "'=1+1", "0.500000", "'-jay\tx", "0.250000", ""]
    assert second == ["'-torn.png", *[""] * 4, f"'{bad.error}"]
