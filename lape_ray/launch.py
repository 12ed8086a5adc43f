"""Ray: one training run on a cluster. The only module that imports ray.

`fit` is what a job calls. It checks everything that can be checked before workers start, makes or continues
the MLflow run, trains through Ray Train, and leaves every status right, whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointConsistencyMode,
    FailureConfig,
    LoggingConfig,
    ScalingConfig,
)

from lape_ray import storage, tracking
from lape_ray.checkpoint import DamagedError, differences, verify
from lape_ray.cluster import connected
from lape_ray.config import TrainConfig, flatten, from_dict, replace_fields, to_dict
from lape_ray.data.facts import split_facts
from lape_ray.data.remote import stage_data
from lape_ray.gauges import RunGauges
from lape_ray.preflight import check_before_start
from lape_ray.train import DivergedError, World, train

RECORD = "run.json"
SECRET = re.compile("SECRET|PASSWORD|TOKEN|ACCESS_KEY|CREDENTIAL")  # in the name of a variable
PAGES_LIMIT_S = 1800.0
SCORE = "score"  # of a checkpoint: its val/acc1; within an epoch, where nothing was evaluated, UNSCORED
UNSCORED = -1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a finished run leaves behind."""

    name: str
    metrics: Mapping[str, float]
    checkpoint: str
    """Address of the best checkpoint."""
    mlflow_run_id: str
    tracking_uri: str

    def summary(self) -> str:
        scores = "  ".join(f"{key} {value:.2f}" for key, value in self.metrics.items() if "acc" in key)
        return (
            f"run {self.name} finished: {scores}\n"
            f"best checkpoint: {self.checkpoint}\n"
            f"MLflow run {self.mlflow_run_id}: {tracking.run_page(self.tracking_uri, self.mlflow_run_id)}"
        )


# --- driver ---------------------------------------------------------------------------------------------------


def fit(config: TrainConfig) -> FitResult:
    """Train `config` to its end, or continue the unfinished run of the same name.

    Raises ValueError for bad input before any worker starts, and Ray Train's error where training fails.
    """
    name = config.run.name or f"{config.recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = _with_absolute_paths(replace_fields(config, {"run.name": name}))
    uri = tracking.tracking_uri(config)
    root = config.run.storage or str(storage.home() / "runs")
    folder, record = storage.join(root, name), storage.join(root, name, RECORD)
    check_before_start(config, storage_root=root, tracking_uri=uri)
    earlier = _earlier_run(config, record)
    with connected():
        use_gpu = _use_gpu(config)
        _wait_for_resources(config, use_gpu, uri)
        if config.run.overwrite:
            storage.delete_folder(folder)
        run_id = _open_mlflow_run(config, uri, earlier)
        _write_record(record, config, run_id, finished=False)
        print(f"run {name}  storage {folder}", flush=True)
        print(f"MLflow run {run_id}: {tracking.ui_command(uri)}", flush=True)
        with _status_of(uri, run_id):
            result = _trainer(config, root, uri, run_id, use_gpu).fit()
            if result.return_value is not None:
                raise DivergedError(result.return_value)
            best, metrics = _best(result)
            with best.as_directory() as files:
                tracking.log_model(uri, run_id, Path(files), metrics)
            if config.run.pages:
                _log_pages(config, best, uri, run_id, use_gpu)
            _write_record(record, config, run_id, finished=config.run.stop_after_epochs is None)
    address = best.path if not storage.is_remote(root) else f"{root.partition('://')[0]}://{best.path}"
    return FitResult(name=name, metrics=metrics, checkpoint=address, mlflow_run_id=run_id, tracking_uri=uri)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers run in other directories, so that a relative path would mean another file there."""
    flat = flatten(config)
    names = ("data.train", "data.val", "run.storage", "run.init_from")
    paths = {name: storage.absolute(flat[name]) for name in names if flat[name]}
    if flat["optim.teacher"]:
        kind, name, file = ["", "", *flat["optim.teacher"].split(":", 2)][
            -3:
        ]  # torchvision:NAME:FILE, or a path
        paths["optim.teacher"] = ":".join(filter(None, (kind, name, storage.absolute(file))))
    return replace_fields(config, paths)


def _earlier_run(config: TrainConfig, record: str) -> dict[str, Any] | None:
    """The record of an unfinished run of this name; refuses a finished one and one of another config."""
    if not storage.exists(record):
        return None
    if config.run.overwrite:
        return None
    earlier: dict[str, Any] = json.loads(storage.read_text(record))
    name = config.run.name
    if changed := differences(from_dict(TrainConfig, earlier["config"]), config):
        raise ValueError(
            f"run {name!r} exists with another config ({'; '.join(changed)}); "
            "choose another --run.name, or --run.overwrite true to delete it"
        )
    if earlier["finished"]:
        raise ValueError(
            f"run {name!r} is finished already; choose another --run.name, or --run.overwrite true to delete it"
        )
    print(f"run {name} exists and is not finished: continuing it", flush=True)
    return earlier


def _write_record(record: str, config: TrainConfig, run_id: str, *, finished: bool) -> None:
    values = {"finished": finished, "mlflow_run_id": run_id, "config": to_dict(config)}
    storage.write_text(record, json.dumps(values, indent=1))


def _use_gpu(config: TrainConfig) -> bool:
    if config.run.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.run.device == "gpu"


def _wait_for_resources(config: TrainConfig, use_gpu: bool, uri: str) -> None:
    """Wait until the cluster could hold all workers; Ray Train itself would wait without a word."""
    run = config.run
    need = {"CPU": run.num_workers * run.cpus_per_worker} | ({"GPU": run.num_workers} if use_gpu else {})
    deadline = time.monotonic() + run.wait_s
    told = False
    while missing := {k: n for k, n in need.items() if ray.cluster_resources().get(k, 0) < n}:
        have = ", ".join(f"{ray.cluster_resources().get(k, 0):g} {k}" for k in missing)
        want = ", ".join(f"{n:g} {k}" for k, n in missing.items())
        if time.monotonic() > deadline:
            raise ValueError(
                f"the run needs {want}, but the cluster has {have}: lower --run.num_workers or "
                "--run.cpus_per_worker, add nodes, or wait longer for them with --run.wait_s"
            )
        if not told:
            print(f"waiting up to {run.wait_s} s: the run needs {want}, the cluster has {have}", flush=True)
        told = True
        time.sleep(1)
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and tracking.is_local(uri):
        raise ValueError(
            f"the MLflow store {uri!r} is a file on this machine, but the cluster has {nodes} nodes: "
            "start an MLflow server and set MLFLOW_TRACKING_URI"
        )


def _open_mlflow_run(config: TrainConfig, uri: str, earlier: dict[str, Any] | None) -> str:
    if earlier is not None and tracking.reopen_run(uri, earlier["mlflow_run_id"]):
        return str(earlier["mlflow_run_id"])
    command = shlex.join(["python", *sys.argv])
    model = config.model
    tags = {"recipe": config.recipe, "seed": str(config.run.seed), **tracking.source_tags(sys.argv[0])}
    tags |= {
        key: getattr(model, key) for key in ("variant", "position", "join", "bias", "bias_join", "rotary")
    }
    splits = {"train": split_facts(config.data, "train"), "val": split_facts(config.data, "val")}
    datasets = {role: (facts.path, facts.sha256) for role, facts in splits.items() if facts.sha256}
    return tracking.create_run(
        config, name=config.run.name or "", command=command, tags=tags, datasets=datasets
    )


@contextlib.contextmanager
def _status_of(uri: str, run_id: str) -> Iterator[None]:
    """Close the MLflow run with the status that is true."""
    try:
        yield
    except Exception:
        tracking.finish_run(uri, run_id, "FAILED")
        raise
    except BaseException:  # Ctrl-C, or the SystemExit by which a stopped job's driver ends
        tracking.finish_run(uri, run_id, "KILLED")
        raise
    tracking.finish_run(uri, run_id, "FINISHED")


def _trainer(
    config: TrainConfig, root: str, uri: str, run_id: str, use_gpu: bool
) -> ray.train.torch.TorchTrainer:
    run = config.run
    resources: dict[str, float] = {"CPU": run.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    # Without an address a clean-up actor of Ray Train looks for clusters on the host, and fails where there are two.
    variables = {**_variables(), "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"config": to_dict(config), "tracking_uri": uri, "mlflow_run_id": run_id},
        torch_config=ray.train.torch.TorchConfig(timeout_s=run.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=run.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=root,
            failure_config=FailureConfig(max_failures=run.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=run.keep_checkpoints,
                checkpoint_score_attribute=SCORE,
                checkpoint_score_order="max",
            ),
            worker_runtime_env={"env_vars": variables},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _variables() -> dict[str, str]:
    """What of the driver's environment the other processes of a run need.

    Secrets are not among them: Ray writes environments into its logs and shows them in its dashboard. Each node has
    them in its own environment, or the job in its runtime environment.
    """
    return {
        key: value
        for key, value in os.environ.items()
        if key.startswith(("AWS_", "MLFLOW_", "LAPE_RAY_")) and not SECRET.search(key)
    }


def _log_pages(config: TrainConfig, best: Checkpoint, uri: str, run_id: str, use_gpu: bool) -> None:
    """Make the run's pages where workers were: there are data and GPU. A failure is a warning, and not the run's."""
    task = ray.remote(_make_pages).options(
        num_cpus=config.run.cpus_per_worker, num_gpus=int(use_gpu), runtime_env={"env_vars": _variables()}
    )
    made = task.remote(to_dict(config), best, uri, run_id)
    try:
        ray.get(made, timeout=PAGES_LIMIT_S)
    except Exception as error:  # whatever goes wrong with pages, the run is trained
        ray.cancel(made, force=True)
        log.warning("the run's pages could not be made: %s", str(error).strip().splitlines()[-1])


def _make_pages(config_values: dict[str, Any], best: Checkpoint, uri: str, run_id: str) -> None:
    from lape_ray.report.build import checkpoint_report  # only here: figures need a second to import
    from lape_ray.report.summary import METRICS, write_run_summary

    config = from_dict(TrainConfig, config_values)
    torch.set_num_threads(config.run.cpus_per_worker)
    facts = tracking.read_run(uri, run_id, METRICS)
    with best.as_directory() as files, tempfile.TemporaryDirectory(prefix="lape-pages-") as folder:
        summary = write_run_summary(config, Path(files), facts, Path(folder, "summary"))
        tracking.log_files(uri, run_id, summary.parent, "summary")
        page = checkpoint_report(Path(files), config, facts.name, Path(folder, "position_report"))
        if page is not None:
            tracking.log_files(uri, run_id, page.parent, "position_report")


def _best(result: ray.train.Result) -> tuple[Checkpoint, Mapping[str, float]]:
    """The checkpoint with the highest val/acc1, the newest of equals."""
    scored = [(c, m) for c, m in result.best_checkpoints or [] if "val/acc1" in m]
    if not scored:
        raise RuntimeError("Ray Train finished without a checkpoint")
    return max(reversed(scored), key=lambda pair: (pair[1]["val/acc1"], pair[1]["epoch"]))


# --- worker ---------------------------------------------------------------------------------------------------


def _worker(payload: dict[str, Any]) -> str | None:
    """One training process: find the checkpoint, train, report.

    Returns why the training diverged, on every rank: as an error, Ray Train would repeat it until it gives up.
    """
    config = from_dict(TrainConfig, payload["config"])
    _quiet_ray_train()
    rank = ray.train.get_context().get_world_rank()
    tracker = tracking.Tracker(payload["tracking_uri"], payload["mlflow_run_id"]) if rank == 0 else None
    reporter = RayReporter(tracker, config)
    device = ray.train.torch.get_device()
    try:
        _stage(config)
        with _whole_checkpoint(reporter, device) as folder:
            train(
                config,
                device=device,
                reporter=reporter,
                resume_from=folder,
                mlflow_run_id=payload["mlflow_run_id"],
            )
    except DivergedError as error:
        return str(error)
    finally:
        if tracker is not None:
            tracker.close()
    return None


def _stage(config: TrainConfig) -> None:
    """Have data that lies on S3 on this worker's node.

    Nodes are ready at different times. All wait here for the last, where no time limit of a collective runs.
    """
    if any(map(storage.is_remote, (config.data.train, config.data.val))):
        stage_data(config.data)
        ray.train.collective.barrier()


@contextlib.contextmanager
def _whole_checkpoint(reporter: RayReporter, device: torch.device) -> Iterator[Path | None]:
    """The newest checkpoint of this run that every worker finds whole; None: there is none yet.

    Raises:
        DamagedError: there are checkpoints, and each is damaged.
    """
    newest = ray.train.get_checkpoint()
    if newest is None:
        yield None
        return
    reported = [entry.checkpoint for entry in ray.train.get_all_reported_checkpoints()]
    others = [checkpoint for checkpoint in reversed(reported) if checkpoint.path != newest.path]
    world, reasons = World.current(device), []
    for checkpoint in (newest, *others):
        with contextlib.ExitStack() as stack:
            reason = ""
            try:
                folder = Path(stack.enter_context(checkpoint.as_directory()))
                verify(folder)
            except (DamagedError, OSError) as error:
                reason = str(error)
            if not world.any(bool(reason)):
                yield folder
                return
        reasons.append(reason or f"{checkpoint.path}: damaged as another worker reads it")
        reporter.line(f"warning: a checkpoint cannot be used, trying the one before: {reasons[-1]}")
    raise DamagedError(
        f"no checkpoint of this run is whole ({'; '.join(reasons)}); "
        "restore one of them, or start again with --run.overwrite true"
    )


def _quiet_ray_train() -> None:
    """Keep Ray Train from repeating every report's metrics for every rank.

    Some of its loggers are named after their file instead of their module, so that LoggingConfig misses them.
    """
    for name in list(logging.root.manager.loggerDict):
        if "ray/train/" in name:
            logging.getLogger(name).setLevel(logging.WARNING)


@dataclass
class RayReporter:
    """Carries what the loop reports to Ray Train, and from rank 0 to MLflow and the job's log."""

    tracker: tracking.Tracker | None
    config: TrainConfig
    told: object = None
    """The last news of a node that is about to go."""

    @cached_property
    def gauges(self) -> RunGauges:
        return RunGauges(self.config.run.name or "", ray.train.get_context().get_world_rank())

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        rate = self.config.data.batch_size / metrics["train/step_s"]
        self.gauges.show({**metrics, "train/images_per_s": rate})
        if self.tracker is not None:
            self.tracker.metrics(metrics, step=step)

    def epoch(self, metrics: dict[str, float], *, step: int, write: Callable[[Path], None]) -> None:
        self.gauges.show({key: metrics[key] for key in ("epoch", "val/acc1") if key in metrics})
        if self.tracker is not None:
            self.tracker.metrics(metrics, step=step)
        score = metrics.get("val/acc1", UNSCORED)
        self._report({**metrics, SCORE: score}, f"checkpoint-epoch-{metrics['epoch']:06.0f}", write)

    def checkpoint(self, metrics: dict[str, float], *, step: int, write: Callable[[Path], None]) -> None:
        self._report({**metrics, SCORE: UNSCORED}, f"checkpoint-step-{step:09}", write)
        self.line(f"checkpoint within epoch {math.ceil(metrics['epoch'])}, after step {step}")

    def leaving(self) -> bool:
        """True once for each time that Ray tells of a node which is about to go."""
        info = ray.train.get_preemption_info()
        news = info is not None and info != self.told
        self.told = info
        return news

    def _report(self, metrics: dict[str, float], name: str, write: Callable[[Path], None]) -> None:
        """Store a checkpoint of all workers under `name`, and wait until it is committed."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="lape-checkpoint-") as folder:
            checkpoint = None
            if self.tracker is not None:
                write(Path(folder))
                if "val/acc1" in metrics:
                    self._position_report(Path(folder), int(metrics["epoch"]))
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(
                metrics,
                checkpoint=checkpoint,
                checkpoint_dir_name=name,
            )
        # report() returns when the files are stored, which is before the controller knows of them: a worker that dies
        # in between would resume from the checkpoint before. This waits, on all ranks, until it is committed.
        ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
        self.gauges.show({"checkpoint_s": time.monotonic() - began})

    def _position_report(self, checkpoint: Path, epoch: int) -> None:
        every = self.config.run.position_report_epochs
        if self.tracker is None or every is None or epoch % every:
            return
        from lape_ray.report.build import checkpoint_report  # only here: figures need a second to import

        with tempfile.TemporaryDirectory(prefix="lape-report-") as folder:
            try:
                page = checkpoint_report(checkpoint, self.config, f"epoch {epoch}", Path(folder))
            except (OSError, ValueError) as error:  # the training goes on
                self.line(f"no position report of epoch {epoch}: {error}")
                return
            if page is not None:
                self.tracker.files(Path(folder), f"position_report/epoch-{epoch:06}")

    def line(self, text: str) -> None:
        if self.tracker is not None:
            print(text, flush=True)
