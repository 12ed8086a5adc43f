"""The page of a finished run: its numbers are those of the predictions, its curves those of the history."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from lape_ray.config import DataConfig, ModelConfig, OptimConfig, RunConfig, Span, TrainConfig, TrainingConfig
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select
from lape_ray.inference.evaluate import evaluate_checkpoint
from lape_ray.inference.samples import images_at, validation_images
from lape_ray.report import figures, outcome
from lape_ray.report.goodput import Attempt, Command, divide
from lape_ray.report.outcome import ClassScore, Predictions
from lape_ray.report.summary import Results, _chosen, _curves, write_page, write_run_summary
from lape_ray.tracking import RunFacts, git_commit, source_tags
from lape_ray.training.flags import Flags
from lape_ray.training.loop import train

HISTORY = {
    "epoch": [(10, 1.0), (20, 2.0), (30, 3.0)],
    "train/epoch_loss": [(10, 2.5), (20, 2.0), (30, 1.5)],
    "train/images_per_s": [(10, 100.0), (20, 200.0), (30, 400.0)],
    "val/loss": [(20, 1.9), (30, 1.4)],
    "val/acc1": [(20, 40.0), (30, 60.0)],
    "val/acc5": [(20, 80.0), (30, 90.0)],
}
TAGS = {
    "command": "python jobs/imagenet_deit.py demo --x '<1>'",
    "join": "lape",
    "mlflow.note.content": "hidden",
}
TIME = divide(
    [Command(began=0, until=100)], [Attempt(began=15, first=0, seconds={"loading": 5, "steps": 75})]
)
RUN = RunFacts(name="run & name", status="FINISHED", tags=TAGS, history=HISTORY)
PREDICTIONS = Predictions(
    labels_N=np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2]),
    best_N=np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 2]),
    probability_N=np.linspace(0.1, 1.0, 10).astype(np.float32),
)


def test_confusion_and_worst_classes_by_hand() -> None:
    counts = outcome.confusion(PREDICTIONS, 4)
    assert counts.tolist() == [[4, 0, 0, 0], [1, 1, 0, 0], [1, 2, 1, 0], [0, 0, 0, 0]]
    assert outcome.worst_classes(counts, 2) == [
        ClassScore(label=2, images=4, right=1, taken_for=((1, 2), (0, 1))),
        ClassScore(label=1, images=2, right=1, taken_for=((0, 1),)),
    ]
    assert [score.accuracy for score in outcome.worst_classes(counts, 9)] == [25, 50, 100]
    assert PREDICTIONS.wrong.tolist() == [4, 6, 7, 8]


def test_hours_are_of_every_epoch_at_its_own_speed_and_workers() -> None:
    """Ten steps of 64 images an epoch, at 100, 200 and 400 images/s."""
    assert outcome.worker_hours(HISTORY, 64, 2) == pytest.approx(1280 * (1 / 100 + 1 / 200 + 1 / 400) / 3600)
    elastic = {**HISTORY, "train/workers": [(10, 1.0), (20, 4.0), (30, 2.0)]}
    assert outcome.worker_hours(elastic, 64, 4) == pytest.approx(640 * (1 / 100 + 4 / 200 + 2 / 400) / 3600)
    assert outcome.worker_hours({}, 64, 2) == 0


def test_curves_are_by_epoch() -> None:
    config = TrainConfig(run=RunConfig(num_workers=2))
    loss, accuracy, speed = _curves(results(config)).axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [
        [[1, 2.5], [2, 2], [3, 1.5]],
        [[2, 1.9], [3, 1.4]],
    ]
    assert [line.get_label() for line in accuracy.lines] == ["top-1", "top-5"]
    assert speed.lines[0].get_ydata().tolist() == [100, 200, 400]


def test_losses_of_two_kinds_have_two_scales() -> None:
    config = TrainConfig(optim=OptimConfig(loss="bce"))
    training, validation, *_ = _curves(results(config)).axes
    assert (training.get_ylabel(), validation.get_ylabel()) == ("bce", "cross-entropy")
    assert [line.get_label() for line in training.lines] == ["training"]
    assert [line.get_label() for line in validation.lines] == ["validation"]


def results(config: TrainConfig) -> Results:
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    return Results(config=config, run=RUN, predictions=PREDICTIONS, classes=("ape", "bee", "cat", "dog"),
                   epoch=2, samples=[(0, picture), (8, picture)], unit="GPU", per_worker=1, time=TIME)  # fmt: skip


def test_the_page_holds_what_a_reader_needs(tmp_path: Path) -> None:
    config = TrainConfig(
        recipe="demo",
        data=DataConfig(batch_size=64),
        training=TrainingConfig(seed=7),
        run=RunConfig(num_workers=2),
    )
    text = write_page(results(config), tmp_path).read_text()
    assert "run &amp; name" in text
    assert "top-1 of the best checkpoint<b>60.00 %</b>" in text
    assert "training speed<b>233 images/s</b>" in text
    assert "goodput: steps that count<b>75.0 % of the time</b>" in text
    assert "epochs, the best one<b>3, 2</b>" in text
    hours = outcome.worker_hours(HISTORY, 64, 2)
    assert f"GPU-hours of training<b>{hours:.3g} on 2 GPU</b>" in text
    assert (
        '<td>cat</td><td class="number">4</td><td class="number">25.0</td><td>bee (2), ape (1)</td>' in text
    )
    assert 'class="card right"><img src="data:image/png;base64,' in text
    assert "ape · 90 %; is cat" in text
    assert "python jobs/imagenet_deit.py demo --x &#x27;&lt;1&gt;&#x27;" in text
    assert "training.seed = 7" in text
    assert "hidden" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.html", "curves.png", "curves.svg", "confusion.png", "confusion.svg", "time.png", "time.svg",
    }  # fmt: skip


def test_the_page_of_an_elastic_run(tmp_path: Path) -> None:
    config = TrainConfig(data=DataConfig(batch_size=64), run=RunConfig(num_workers=Span(1, 2)))
    text = write_page(results(config), tmp_path).read_text()
    assert re.search(r"GPU-hours of training<b>[\d.]+ on 1 to 2 GPU</b>", text)


def test_the_figure_of_time_has_a_bar_for_each_part_that_took_some() -> None:
    (axis,) = figures.time_figure(TIME).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["steps that count", "init", "idle"]
    assert [bar.get_width() for bar in axis.patches] == [75, 20, 5]
    assert {"75.0 %  0:01:15", "20.0 %  20.0 s"} <= {text.get_text() for text in axis.texts}


def test_the_confusion_figure_shows_shares_of_all_images() -> None:
    figure = figures.confusion_figure(np.array([[1, 2], [0, 3]]), np.array([4, 3]), ["a", "b"])
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[25, 50], [0, 100]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["25", "50", "100"]


def test_samples_are_some_of_all_and_some_of_the_wrong() -> None:
    labels = np.arange(1000) % 10
    best = labels.copy()
    best[900:] += 1
    chosen = _chosen(Predictions(labels_N=labels, best_N=best, probability_N=np.ones(1000)))
    assert len(set(chosen.tolist())) == len(chosen)
    assert (chosen >= 900).sum() >= 12
    assert chosen[0] == 0
    assert len(_chosen(Predictions(labels_N=labels, best_N=labels, probability_N=np.ones(1000)))) == 12


class Keep:
    """A reporter that writes the last checkpoint and the history of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.history = folder, {}  # type: ignore[var-annotated]

    def step(self, metrics: dict[str, float], *, step: int) -> None: ...

    def epoch(self, metrics, *, step, snapshot) -> None:  # type: ignore[no-untyped-def]
        for key, value in metrics.items():
            self.history.setdefault(key, []).append((step, value))
        self.folder.mkdir(exist_ok=True)
        snapshot().save(self.folder)

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: object) -> None: ...

    def checkpoint_stored(self) -> None: ...

    def wait_until_saved(self) -> None: ...

    def poll_flags(self) -> Flags:
        return Flags.NONE

    def node_leaving(self) -> bool:
        return False

    def line(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path, RunFacts]:
    home = tmp_path_factory.mktemp("trained")
    for split in ("train", "val"):
        write_beton(select(digits(split), "per-class:16"), str(home / f"{split}.beton"), workers=1)
    config = TrainConfig(
        model=ModelConfig(join="lape", embed_dim=32, depth=2, num_heads=2, image_size=32, patch_size=8, num_classes=10),
        data=DataConfig(train=str(home / "train.beton"), val=str(home / "val.beton"), batch_size=32, eval_crop=1.0),
        optim=OptimConfig(epochs=2, warmup_epochs=0),
        run=RunConfig(device="cpu"),
    )  # fmt: skip
    reporter = Keep(home / "checkpoint")
    train(config, device=torch.device("cpu"), reporter=reporter)
    return (
        config,
        home / "checkpoint",
        RunFacts(name="r", status="FINISHED", tags={}, history=reporter.history),
    )


def test_a_real_run_ends_in_a_page_that_agrees_with_evaluation(
    trained: tuple[TrainConfig, Path, RunFacts], tmp_path: Path
) -> None:
    config, checkpoint, run = trained
    text = write_run_summary(config, checkpoint, run, tmp_path, time=divide([], [])).read_text()
    expected = evaluate_checkpoint(str(checkpoint), config)["acc1"]
    assert f"top-1 of the best checkpoint<b>{expected:.2f} %</b>" in text
    assert "CPU-hours of training" in text
    assert "validation images<b>160</b>" in text
    assert "goodput" not in text, "nothing is known of the time"


def test_images_are_read_at_their_places(trained: tuple[TrainConfig, Path, RunFacts]) -> None:
    config = trained[0]
    every = validation_images(config, 160)
    assert every.shape == (160, 3, 32, 32)
    torch.testing.assert_close(images_at(config, np.array([5, 159, 0])), every[[5, 159, 0]])
    assert images_at(config, np.array([], int)).shape == (0, 3, 32, 32)


def test_the_commit_of_a_checkout_says_when_it_is_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "m")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"
    monkeypatch.setenv("LAPE_RAY_GIT_COMMIT", "abc")
    assert source_tags("jobs/x.py")["mlflow.source.git.commit"] == "abc"
