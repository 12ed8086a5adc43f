"""`hf-hub:OWNER/NAME` against a stand-in of the hub: what is fetched and kept, and lines that say the fix."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from helpers.hub import TOKEN, Hub, Repo, stand_in

from lape_ray import storage
from lape_ray.config import TrainConfig, replace_fields
from lape_ray.storage import hub as door
from lape_ray.training.preflight import with_absolute_paths
from lape_ray.values.redaction import shared_variables

TIMM = {"model.safetensors": b"weights", "config.json": b"{}", "pytorch_model.bin": b"the same again"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with stand_in(tmp_path / "cache") as made:
        yield made


def test_a_repository_is_a_file_with_its_config_or_a_folder_of_ours(hub: Hub) -> None:
    hub.repos["o/timm"] = Repo(files=TIMM)
    hub.repos["o/older"] = Repo(files={"pytorch_model.bin": b"old", "config.json": b"{}"})
    ours = {"meta.json": b"{}", "model.safetensors": b"w", "ema.safetensors": b"e", "optimizer.pt": b"o"}
    hub.repos["o/ours"] = Repo(files=ours)
    file = storage.local("hf-hub:o/timm")
    assert (file.name, file.read_bytes()) == ("model.safetensors", b"weights")
    assert {one.name for one in file.parent.iterdir()} == {"model.safetensors", "config.json"}, (
        "one copy of weights"
    )
    assert storage.local("hf-hub:o/older").read_bytes() == b"old"
    folder = storage.local("hf-hub:o/ours")
    assert {one.name for one in folder.iterdir()} == set(ours) - {"optimizer.pt"}
    with storage.opened("hf-hub:o/ours") as opened:
        assert opened == folder
    assert folder.exists(), "a copy of the hub's is not deleted after its use"


def test_a_process_keeps_to_one_commit_and_asks_once(hub: Hub) -> None:
    hub.repos["o/n"] = Repo(files=TIMM)
    first, asked = storage.local("hf-hub:o/n"), len(hub.asked)
    commit = hub.repos["o/n"].commit
    hub.repos["o/n"].files = TIMM | {"model.safetensors": b"others"}
    assert storage.local("hf-hub:o/n") == first and len(hub.asked) == asked
    door._fetch.cache_clear()  # as another process
    assert storage.local("hf-hub:o/n").read_bytes() == b"others"
    assert storage.local(f"hf-hub:o/n@{commit}").read_bytes() == b"weights"


def test_without_a_network_the_copy_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["o/n"] = Repo(files=TIMM)
    file = storage.local("hf-hub:o/n")
    door._fetch.cache_clear()
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert storage.local("hf-hub:o/n") == file and len(hub.asked) == asked
    with pytest.raises(ConnectionError) as caught:
        storage.local("hf-hub:o/other@v1.0")
    assert str(caught.value) == (
        "hf-hub:o/other@v1.0 is not whole among this machine's copies, and HF_HUB_OFFLINE forbids to fetch it; "
        "fetch it once with `HF_HUB_OFFLINE=0 hf download o/other --revision v1.0`"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    door._fetch.cache_clear()
    assert storage.local("hf-hub:o/n") == file
    with pytest.raises(
        ConnectionError, match=r"^hf-hub:o/x: http://127\.0\.0\.1:9 is not reached \(.+\), and this"
    ):
        storage.local("hf-hub:o/x")


def test_a_private_repository_wants_its_token_and_shows_none(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    hub.repos["o/secret"] = Repo(private=True, files=TIMM)
    with pytest.raises(
        FileNotFoundError, match=r"^hf-hub:o/secret does not exist, or is private .* set HF_TOKEN"
    ):
        storage.local("hf-hub:o/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong-one")
    with pytest.raises(FileNotFoundError) as caught:
        storage.local("hf-hub:o/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert storage.local("hf-hub:o/secret").read_bytes() == b"weights"
    assert ("GET", "/api/models/o/secret/revision/main", TOKEN) in hub.asked
    assert "HF_TOKEN" not in shared_variables()
    shown = str(caught.value) + caplog.text + "".join(capfd.readouterr())
    for secret in ("hf_wrong-one", TOKEN):
        assert secret not in shown
        assert not [
            file for file in tmp_path.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()
        ]


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("hf-hub:o/none", FileNotFoundError, "does not exist, or is private"),
        ("hf-hub:o/n@none", FileNotFoundError, "the repository has no branch, tag or commit 'none'"),
        (
            "hf-hub:o/empty",
            FileNotFoundError,
            "holds neither model.safetensors nor pytorch_model.bin .* `hf download o/empty`",
        ),
        (
            "hf-hub:o/gated",
            PermissionError,
            r"gives access on request; ask for it at http://\S+/o/gated, and set HF_TOKEN",
        ),
        ("hf-hub:n", ValueError, "'hf-hub:n' names no repository; write hf-hub:OWNER/NAME or"),
        ("hf-hub:o/../../x", ValueError, "names no repository"),
    ],
)
def test_what_is_not_there_is_one_line(hub: Hub, address: str, error: type[Exception], words: str) -> None:
    hub.repos["o/n"], hub.repos["o/empty"] = Repo(files=TIMM), Repo(files={"README.md": b"text"})
    hub.repos["o/gated"] = Repo(gated=True, files=TIMM)
    with pytest.raises(error, match=words) as caught:
        storage.local(address)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"^reading hf-hub:o/n needs .* not installed: pip install lape_ray\[hub\]$"
    ):
        storage.local("hf-hub:o/n")


def test_configs_keep_the_address_as_it_is() -> None:
    """As a path it would become one of this machine's; and nothing is asked of the hub."""
    for teacher in ("hf-hub:o/t@v1", "torchvision:resnet50:hf-hub:o/t", "s3://b/t"):
        config = replace_fields(TrainConfig(), {"training.init_from": "hf-hub:o/n", "optim.teacher": teacher})
        made = with_absolute_paths(config)
        assert (made.training.init_from, made.optim.teacher) == ("hf-hub:o/n", teacher)
    here = with_absolute_paths(replace_fields(TrainConfig(), {"optim.teacher": "torchvision:resnet50:x.pth"}))
    assert here.optim.teacher == f"torchvision:resnet50:{Path.cwd()}/x.pth"
    with pytest.raises(ValueError, match="the hub is read for checkpoints alone; give a folder or s3://"):
        storage.exists("hf-hub:o/n")
