"""The metrics that each worker of a run shows to Prometheus while it trains, beside Ray's own.

Ray adds `ray_` to the names and its node and session to the labels; ours are `run` and `rank`. The dashboard in
docker/monitoring draws them.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

GAUGES = {
    "train/loss": ("lape_loss", "training loss since the last log step, mean over the workers"),
    "train/lr": ("lape_learning_rate", "learning rate of the last step"),
    "train/step_s": ("lape_step_seconds", "duration of an optimizer step, mean since the last log step"),
    "train/data_wait_s": (
        "lape_data_wait_seconds",
        "of it, how long this worker waited for its loader",
    ),
    "train/images_per_s": ("lape_images_per_second", "images trained in a second, by all workers"),
    "val/acc1": ("lape_val_top1_percent", "top-1 of the last evaluation"),
    "epoch": ("lape_epoch", "epochs done"),
    "checkpoint_s": (
        "lape_checkpoint_seconds",
        "duration of the last checkpoint, written, uploaded and committed",
    ),
    "goodput": ("lape_goodput_percent", "share of the run's wall time that went into steps that count"),
}
TIME = "time/"
"""The beginning of the names of what each part of the run's wall time took so far, in seconds (`report.goodput`)."""


class RunGauges:
    """One worker's gauges of one run."""

    def __init__(self, run: str, rank: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._gauges = {
            key: Gauge(name, description=about, tag_keys=("run", "rank"))
            for key, (name, about) in GAUGES.items()
        }
        self._time = Gauge(
            "lape_time_seconds",
            description="wall time of the run so far, divided into parts",
            tag_keys=("run", "rank", "part"),
        )

    def show(self, metrics: Mapping[str, float]) -> None:
        """Set the gauges of those metrics that have one."""
        for key in metrics.keys() & self._gauges.keys():
            self._gauges[key].set(float(metrics[key]), tags=self._tags)
        for key, seconds in metrics.items():
            if key.startswith(TIME):
                self._time.set(float(seconds), tags={**self._tags, "part": key.removeprefix(TIME)})
