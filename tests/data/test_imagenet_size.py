"""What ImageNet's number of images costs: time and memory of an image are the same from 10,000 to 1,281,167 of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import ROOT
from helpers.many_images import label

from lape_ray.data.beton import check_beton, read_contents

SIZES = (10_000, 100_000, 1_281_167)  # the last is ImageNet-1K's, in 1,001 shards
STARTS = ("open", "order", "resume")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def measured(*words: object) -> str:
    command = [sys.executable, str(ROOT / "tests/helpers/many_images.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure(images: int, folder: Path) -> dict[str, float]:
    """Write and read that many, check the file, and remove it."""
    shards, path = folder / f"shards{images}", folder / f"{images}.beton"
    measured("shards", shards, images)
    found = json.loads(measured("write", shards, path))
    shutil.rmtree(shards)
    found |= json.loads(measured("read", path))
    manifest = check_beton(path, deep=images == SIZES[0])
    assert manifest.num_samples == images
    assert np.array_equal(read_contents(path).labels_N, label(np.arange(images)))
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == manifest.sha256
    path.unlink()
    print(images, json.dumps(found))
    return found


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    folder = tmp_path_factory.mktemp("many")
    try:
        return {images: measure(images, folder) for images in SIZES}
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["write", *STARTS])
def test_an_image_takes_the_same_time_among_many(what: str, costs: dict[int, dict[str, float]]) -> None:
    """Twice and thrice it is noise and caches; what grew with the square of their number would be 13 times it."""
    few, many = (costs[images][what] / images for images in SIZES[1:])
    assert many < (2 if what == "write" else 4) * few


@pytest.mark.parametrize("what", ["writer_bytes", "loader_bytes"])
def test_an_image_takes_the_same_memory_among_many(what: str, costs: dict[int, dict[str, float]]) -> None:
    small, few, many = (costs[images][what] for images in SIZES)
    assert (many - few) / (SIZES[2] - SIZES[1]) < 2 * (few - small) / (SIZES[1] - SIZES[0])


def test_a_process_that_encodes_needs_no_more_memory_among_many(costs: dict[int, dict[str, float]]) -> None:
    assert costs[SIZES[2]]["encoder_bytes"] < 1.2 * costs[SIZES[1]]["encoder_bytes"]


@pytest.mark.parametrize("what", STARTS)
def test_a_training_of_imagenets_size_starts_within_a_second(
    what: str, costs: dict[int, dict[str, float]]
) -> None:
    assert costs[SIZES[2]][what] < 1
