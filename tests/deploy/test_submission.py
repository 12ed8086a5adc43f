"""What `ray job submit --working-dir .` sends to the cluster, whose limit is 500 MiB."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parent.parent.parent


def sent(folder: Path, package: Path) -> dict[str, int]:
    """The files that Ray would send, and their sizes in the package."""
    create_package(str(folder), package, include_gitignore=True)
    return {entry.filename: entry.compress_size for entry in zipfile.ZipFile(package).infolist()}


def test_the_checkout_is_small(tmp_path: Path) -> None:
    """Its environment, runs and data beside the code stay here."""
    files = sent(ROOT, tmp_path / "package.zip")
    assert "jobs/imagenet_deit.py" in files
    assert "lape_ray/data/sampler.py" in files
    assert sum(files.values()) < 50e6


def test_data_and_runs_stay_here(tmp_path: Path) -> None:
    tree = tmp_path / "checkout"
    shutil.copytree(ROOT / "lape_ray/data/augment", tree / "lape_ray/data/augment")
    shutil.copy(ROOT / ".gitignore", tree)
    for name in (
        "data/train/n01440764/a.JPEG",
        "train.beton",
        "runs/a/checkpoint-epoch-000001/model.safetensors",
    ):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    files = [name for name in sent(tree, tmp_path / "package.zip") if not name.endswith("/")]
    assert "lape_ray/data/augment/__init__.py" in files
    assert not [name for name in files if not name.startswith(("lape_ray/", ".gitignore"))]
