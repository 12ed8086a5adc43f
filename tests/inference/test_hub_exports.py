"""A checkpoint goes to the hub and comes back: the same logits, its card, and where its network is known from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from helpers.commands import run_here
from helpers.hub import TOKEN, Hub, Repo, stand_in
from safetensors.torch import load, save_file

from lape_ray.config import DataConfig, ModelConfig, TrainConfig, config_hash
from lape_ray.inference.checkpoints import open_predictor, resolve_checkpoints
from lape_ray.inference.evaluate import config_for
from lape_ray.inference.timm import export_timm
from lape_ray.model import build_model, resolve
from lape_ray.storage import local
from lape_ray.training.architecture import TIMM_NAMES, timm_network
from lape_ray.training.checkpoint import Metadata, snapshot, weights_sha256
from lape_ray.training.initial import load_initial
from lape_ray.training.loss import load_teacher

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 32, "num_classes": 3}
SWIN = {"variant": "swin_tiny", "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": 1, "image_size": 64,
        "window_size": 2, "num_classes": 3}  # fmt: skip
NETWORKS = {
    "deit": SIZES,
    "none": SIZES | {"position": "none"},
    "lape": SIZES | {"join": "lape", "bias": "relative2d", "bias_join": "lape", "rotary": "axial"},
    "deit3-without-scale": SIZES | {"variant": "deit3_small", "layer_scale": 0.0},
    "distilled": SIZES | {"variant": "deit_tiny_distilled", "position": "sincos2d"},
    "cct": SIZES | {"variant": "cct_7_3x1", "join": "lape"},
    "swin": SWIN | {"position": "learnable", "join": "lape"},
    "swin-bias": SWIN | {"position": "none", "bias": "relative2d"},
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with stand_in(tmp_path / "cache") as made:
        yield made


def checkpoint(folder: Path, model: dict[str, object], **data: object) -> tuple[Path, torch.nn.Module]:
    """A folder of ours with random weights."""
    torch.manual_seed(0)
    made = TrainConfig(
        model=ModelConfig(**model),  # type: ignore[arg-type]
        data=DataConfig(train="/secret/place/birds_train.beton", val="/secret/place/birds_val.beton", **data),  # type: ignore[arg-type]
        recipe="deit_tiny_lape",
    )
    network = build_model(made.model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    facts = Metadata(
        epochs_done=3, steps_done=30, config=made, metrics={"val/acc1": 71.25, "val/loss": 1.5, "val_ema/acc1": 72.0},
        world_size=1, classes=("jay", "owl", "wren"),
    )  # fmt: skip
    folder.mkdir(parents=True)
    snapshot(model=network, ema=None, optimizer=torch.optim.SGD(network.parameters()), metadata=facts).save(
        folder
    )
    return folder, network.eval()


def images(size: int) -> torch.Tensor:
    return torch.randint(
        256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
def test_the_network_of_an_export_is_known(tmp_path: Path, model: dict[str, object]) -> None:
    """Without a recipe: logits, classes and what evaluation sees are the checkpoint's."""
    folder, _ = checkpoint(tmp_path / "c", model, mean=(0.1, 0.2, 0.3), eval_crop=0.75)
    first, _ = open_predictor(str(folder), {})
    export_timm(first, tmp_path / "timm")
    again, _ = open_predictor(str(tmp_path / "timm/model.safetensors"), {})
    assert resolve(again.config.model) == resolve(first.config.model)
    assert (again.classes, again.config.data.mean, again.config.data.eval_crop) == (
        ("jay", "owl", "wren"), (0.1, 0.2, 0.3), 0.75,
    )  # fmt: skip
    seen = images(first.size)
    with torch.no_grad():
        torch.testing.assert_close(again.model(seen), first.model(seen))


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        *[(name, {"variant": variant}) for variant, name in TIMM_NAMES.items() if "swin" not in name],
        ("swin_tiny_patch4_window7_224", {"variant": "swin_tiny", "position": "none", "bias": "relative2d"}),
        ("deit_base_patch16_384.fb_in1k", {"variant": "deit_base", "image_size": 384}),
        ("vit_tiny_patch16_224", {"variant": "deit_tiny"}),
        ("deit3_small_patch16_384", {"variant": "deit3_small", "image_size": 384}),
        (
            "swin_small_patch4_window7_224",
            {"variant": "swin_small", "position": "none", "bias": "relative2d"},
        ),
        (
            "swin_base_patch4_window12_384",
            {
                "variant": "swin_base",
                "position": "none",
                "bias": "relative2d",
                "window_size": 12,
                "image_size": 384,
            },
        ),
    ],
)
def test_timms_architectures_are_known(tmp_path: Path, architecture: str, fields: dict[str, object]) -> None:
    """By their names, and they have the shapes that timm gives them."""
    with torch.device("meta"):
        theirs = timm.create_model(architecture.partition(".")[0], num_classes=3)
    size = theirs.pretrained_cfg["input_size"][1]
    said = {"architecture": architecture, "num_classes": 3, "pretrained_cfg": {"input_size": [3, size, size]}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").touch()
    made = config_for(str(tmp_path / "model.safetensors"), None, {}).model
    expected = ModelConfig(**{"num_classes": 3, **fields})  # type: ignore[arg-type]
    assert resolve(made) == resolve(expected)
    assert (made.position, made.join, made.bias) == (expected.position, "basic", expected.bias)
    with torch.device("meta"):
        ours = build_model(made)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    "said",
    [
        {"architecture": "deit3_huge_patch14_224"},
        {"architecture": "vit_base_patch16_clip_224"},
        {"architecture": "deit_tiny"},
        {"architecture": "deit_tiny_patch16_224", "model_args": {"qk_norm": True}},
    ],
)
def test_other_architectures_are_left_to_the_reader(tmp_path: Path, said: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(said | {"pretrained_cfg": {}}))
    assert timm_network(tmp_path / "model.safetensors") == {}


def test_what_is_given_comes_before_what_is_known(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "c", SIZES | {"join": "lape"})
    export_timm(open_predictor(str(folder), {})[0], tmp_path / "timm")
    file = str(tmp_path / "timm/model.safetensors")
    assert config_for(file, None, {"model.join": "lape_shared"}).model.join == "lape_shared"
    assert config_for(file, "deit_small_basic", {}).model.join == "basic"
    other = config_for(file, None, {"model.variant": "deit_small"}).model
    assert (other.variant, other.join, other.depth) == ("deit_small", "basic", None)
    values = json.loads((tmp_path / "timm/config.json").read_text())
    values["position"]["join"] = "glued"
    (tmp_path / "timm/config.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"timm/config\.json: join='glued' is not known; choose .*; mend or remove it"
    ):
        config_for(file, None, {})


# --- the hub --------------------------------------------------------------------------------------------------


def test_an_upload_comes_back(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushed by the command, read by its address wherever a checkpoint is read, and by timm."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("LAPE_RAY_HOME", str(tmp_path / "home"))
    folder, network = checkpoint(tmp_path / "c", SIZES)
    done = run_here("jobs/export.py", folder, "--hub", "me/birds")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f'{hub.uri}/me/birds: pushed, private; timm.create_model("hf-hub:me/birds", pretrained=True), or '
        "hf-hub:me/birds in the place of a checkpoint\n"
    )
    repo = hub.repos["me/birds"]
    assert repo.private and set(repo.files) == {"model.safetensors", "config.json", "README.md"}
    first, _ = open_predictor(str(folder), {})
    address = "hf-hub:me/birds"
    again, _ = open_predictor(address, {})
    theirs = timm.create_model(address, pretrained=True).eval()
    seen = images(32)
    with torch.no_grad():
        expected = first.model(seen)
        torch.testing.assert_close(again.model(seen), expected)
        torch.testing.assert_close(theirs(first.model.normalize(seen)), expected, atol=1e-4, rtol=0)
        teacher = load_teacher(
            address, num_classes=3, image_sizes=(32,), classes=("owl", "jay", "wren"), data=DataConfig()
        )
        torch.testing.assert_close(
            teacher(first.model.normalize(seen)), expected[:, [1, 0, 2]], atol=1e-4, rtol=0
        )
    started = build_model(first.config.model)
    assert load_initial(started, address, DataConfig(), ("jay", "owl", "wren")) == []
    assert all(
        torch.equal(a, b)
        for a, b in zip(started.state_dict().values(), network.state_dict().values(), strict=True)
    )
    (named,) = resolve_checkpoints([f"{address}@main"], {}, downloads=tmp_path)
    assert named.label == "birds@main"
    (told,) = resolve_checkpoints([f"x={address}@deit_tiny_basic,depth=2"], {}, downloads=tmp_path)
    assert (told.label, told.config.recipe) == ("x", "deit_tiny_basic")


def test_a_command_finds_the_hub_in_its_environment(hub: Hub, tmp_path: Path) -> None:
    """Read and pushed by a process of its own; its token is neither shown nor stored."""
    folder, _ = checkpoint(tmp_path / "c", SIZES)
    hub.repos["me/run"] = Repo(private=True, files={one.name: one.read_bytes() for one in folder.iterdir()})
    variables = {
        "HF_ENDPOINT": hub.uri,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "jobs/export.py", "hf-hub:me/run", "--hub", "me/copy"]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(hub.repos["me/copy"].files) == {"model.safetensors", "config.json", "README.md"}
    copied = load(hub.repos["me/copy"].files["model.safetensors"])
    original = load((folder / "model.safetensors").read_bytes())
    assert copied.keys() == original.keys() and all(
        torch.equal(copied[name], original[name]) for name in copied
    )
    assert TOKEN not in done.stdout + done.stderr
    kept = [file for file in (tmp_path / "hf").rglob("*") if file.is_file()]
    assert kept and not [file for file in kept if TOKEN.encode() in file.read_bytes()]


def test_the_card_says_what_it_is_and_no_path(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder, _ = checkpoint(tmp_path / "c", SIZES | {"join": "lape"})
    done = run_here("jobs/export.py", folder, "--hub", "me/birds", "--hub-public")
    assert (done.returncode, hub.repos["me/birds"].private) == (0, False)
    assert "pushed, public; loads with hf-hub:me/birds" in done.stdout
    card = hub.repos["me/birds"].files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: lape_ray\npipeline_tag: image-classification\n")
    for words in (
        "# birds\n", "| network | deit_tiny, ", "| position embedding | learnable, join lape |",
        "| recipe | `deit_tiny_lape` |", "`model.depth: None -> 2`",
        "| training data | `birds_train` |", "| acc1 | 71.25 |", "| loss | 1.5 |", "timm has no join=lape",
        "lape-ray evaluate hf-hub:me/birds --data.val VAL.beton", "@inproceedings{yu2023lape,", "| trained | 3 ",
    ):  # fmt: skip
        assert words in card, words
    assert "72" not in card.partition("## Figures")[2].partition("##")[0], (
        "the average's figures are not of these weights"
    )
    everything = b"".join(hub.repos["me/birds"].files.values())
    assert b"/secret/place" not in everything and TOKEN.encode() not in everything


def test_a_push_that_is_refused_says_why(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = checkpoint(tmp_path / "c", SIZES)
    hub.repos["me/public"] = Repo(files={"README.md": b"mine"})

    def line(*words: str) -> str:
        done = run_here("jobs/export.py", folder, *words)
        assert done.returncode == 2 and done.stdout == ""
        (text,) = done.stderr.splitlines()
        return text

    assert "--hub me/x: HF_TOKEN is not set; set it in the environment to a token that may write" in line(
        "--hub", "me/x"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_reads-alone")
    assert "refuses it to the token; set HF_TOKEN to one that may do it (a push: write)" in line(
        "--hub", "me/x"
    )
    assert "hf_reads" not in line("--hub", "me/x")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert f"{hub.uri}/me/public is public already: give --hub-public" in line("--hub", "me/public")
    assert hub.repos["me/public"].files == {"README.md": b"mine"}
    assert "'birds' names no repository; write --hub OWNER/NAME" in line("--hub", "birds")
    assert "--hub-public needs --hub" in line("--timm", str(tmp_path / "t"), "--hub-public")


def test_a_folder_of_ours_and_an_older_file_are_read_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    folder, network = checkpoint(tmp_path / "c", SIZES | {"join": "lape"})
    hub.repos["me/run"] = Repo(files={one.name: one.read_bytes() for one in folder.iterdir()})
    opened, _ = open_predictor("hf-hub:me/run", {})
    assert (opened.config.model.join, opened.classes) == ("lape", ("jay", "owl", "wren"))
    assert opened.trained is not None and config_hash(opened.trained.config) == config_hash(opened.config)
    torch.save({"model": network.state_dict()}, tmp_path / "old.bin")
    hub.repos["me/old"] = Repo(files={"pytorch_model.bin": (tmp_path / "old.bin").read_bytes()})
    fields = {f"model.{name}": value for name, value in SIZES.items()} | {"model.join": "lape"}
    older, _ = open_predictor("hf-hub:me/old", fields)
    seen = images(32)
    with torch.no_grad():
        torch.testing.assert_close(older.model(seen), opened.model(seen))


def test_the_digest_is_that_of_the_weights(hub: Hub, tmp_path: Path) -> None:
    """So that a run does not go on from others that took their name."""
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    hub.repos["me/w"] = Repo(files={"model.safetensors": content})
    assert weights_sha256(local("hf-hub:me/w")) == hashlib.sha256(content).hexdigest()
