"""One training run on a cluster, as its driver sees it.

`fit` is what a job calls. It checks everything that can be checked before workers start, makes or continues
the MLflow run, trains through Ray Train, and leaves every status right, whatever happens.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from lape_ray import storage, tracking
from lape_ray.cluster.checkpoint_list import best, read_list, recover
from lape_ray.cluster.connection import connected, refuse_little_shared_memory
from lape_ray.cluster.controller import train_to_the_end, variables
from lape_ray.cluster.resources import lack, wait_for_room
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_record import RECORD, Record, earlier_run, write_run
from lape_ray.cluster.supervisor import Supervisor, supervised
from lape_ray.config import NETWORK_FIELDS, TrainConfig, replace_fields
from lape_ray.recipes import recipe
from lape_ray.storage import LEASE, LEASE_FILES, Lease, LeaseLostError, leased
from lape_ray.training.checkpoint import read_metadata
from lape_ray.training.inputs import dataset_digests, input_digests
from lape_ray.training.loop import StoppedError
from lape_ray.training.preflight import check_before_start, with_absolute_paths

PAGES_LIMIT_S = 1800.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """The result of a finished run."""

    name: str
    metrics: Mapping[str, float]
    checkpoint: str
    """Address of the best checkpoint."""
    mlflow_run_id: str
    tracking_uri: str
    tracked: bool
    """True where MLflow has all of it."""

    def summary(self) -> str:
        scores = "  ".join(f"{key} {value:.2f}" for key, value in self.metrics.items() if "acc" in key)
        return (
            f"run {self.name} finished: {scores}\n"
            f"best checkpoint: {self.checkpoint}\n"
            f"MLflow run {self.mlflow_run_id}: {tracking.run_page(self.tracking_uri, self.mlflow_run_id)}"
            + (
                ""
                if self.tracked
                else "\nMLflow does not have all of it: submit the same command again to complete it"
            )
        )


# --- driver ---------------------------------------------------------------------------------------------------


def fit(config: TrainConfig) -> FitResult:
    """Train `config` to its end, or continue the unfinished run of the same name.

    Raises:
        ValueError, OSError: bad input, before any worker starts.
        StoppedError: SIGTERM ended it; it left a checkpoint, and the same name goes on from it.
        StorageError: checkpoints cannot be stored any more; the one before the first of them is whole.
        DivergedError: the loss is no finite number.
        WorkersFailedError: workers failed again and again at the same place.
        LeaseHeldError: another driver is at work on this run.
        LeaseLostError: another driver took the run over while this one could not be seen.
    """
    name = config.run.name or f"{_what_it_is(config)}-{time.strftime('%Y%m%d-%H%M%S')}"
    config, root = prepared(replace_fields(config, {"run.name": name}))
    uri, folder = tracking.tracking_uri(config), storage.join(root, name)
    check_before_start(config, storage_root=root)
    tracking.check_trackers(config.tracking)
    inputs = input_digests(config)
    earlier_run(config, folder, inputs)  # a name that cannot be used is refused before anything waits
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(leased(folder, f"run {name}"))
        earlier = earlier_run(config, folder, inputs)
        if earlier is None:  # a run that continues can wait for the server
            tracking.check_reachable(uri)
        else:
            print(f"run {name} exists and is not finished: continuing it", flush=True)
        stack.enter_context(connected())
        use_gpu = uses_gpu(config)
        _wait_for_workers(config, use_gpu)
        refuse_local_store(uri)
        supervisor = stack.enter_context(supervised(Supervisor, folder, config.run.max_failures))
        if use_gpu and config.run.workers.high > 1:
            refuse_little_shared_memory()
        lease.check()
        if config.run.overwrite:
            storage.empty_folder(folder, but=LEASE_FILES)
        recover(folder, _tell, before=storage.modified(storage.join(folder, LEASE)))
        run = Run(
            config=config,
            folder=folder,
            lease=lease.token,
            tracking_uri=uri,
            mlflow_run_id=_open_mlflow_run(config, uri, earlier, inputs),
            use_gpu=use_gpu,
            inputs=inputs,
        )
        write_run(run, finished=False)
        _tell(f"run {name}  storage {folder}\nMLflow run {run.mlflow_run_id}: {tracking.ui_command(uri)}")
        return _train_and_conclude(run, lease, supervisor)


def _tell(text: str) -> None:
    print(text, flush=True)


def _train_and_conclude(run: Run, lease: Lease, supervisor: Any) -> FitResult:
    """Train, and leave the best checkpoint, the pages and the status in MLflow and in the run's record."""
    uri, run_id = run.tracking_uri, run.mlflow_run_id
    with status_of(uri, run_id) as end:
        before = read_list(run.folder)
        train_to_the_end(run, lease, supervisor)
        lease.check()
        chosen = best(recover(run.folder, log.warning))
        if chosen is None:
            raise RuntimeError("the training ended without a checkpoint")
        checkpoint = storage.join(run.folder, chosen.name)
        with storage.opened(checkpoint) as files:
            metrics = read_metadata(files).metrics
            tracked = (
                tracking.send_unsent(run.folder, uri, run_id)
                and (read_list(run.folder) == before or tracking.holds_metric(uri, run_id, "epoch"))
                and tracking.log_model(uri, run_id, files, metrics)
            )
            end.tracked = tracked
        if run.config.tracking.pages and tracked:
            _log_pages(run, checkpoint)
    lease.check()
    write_run(run, finished=tracked and run.config.run.stop_after_epochs is None)
    recover(run.folder, log.warning, before=storage.modified(storage.join(run.folder, RECORD)))
    return FitResult(
        name=run.name,
        metrics=metrics,
        checkpoint=checkpoint,
        mlflow_run_id=run_id,
        tracking_uri=uri,
        tracked=tracked,
    )


def _what_it_is(config: TrainConfig) -> str:
    """Name the recipe and what of the network is not the recipe's, as in `deit_tiny_lape-join-basic`."""
    if not config.recipe:
        return "run"
    of_recipe = recipe(config.recipe).model
    other = [key for key in NETWORK_FIELDS if getattr(config.model, key) != getattr(of_recipe, key)]
    return "-".join([config.recipe, *(f"{key}-{getattr(config.model, key)}" for key in other)])


def uses_gpu(config: TrainConfig) -> bool:
    """Tell whether workers of this config compute on GPUs of the connected cluster."""
    if config.run.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.run.device == "gpu"


def _wait_for_workers(config: TrainConfig, use_gpu: bool) -> None:
    """Wait until the cluster could hold the workers that the run needs at least; a ValueError where it cannot."""
    run = config.run
    need = {"CPU": run.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    if not wait_for_room("the run", need, run.workers.low, wait_s=run.wait_s, tell=_tell):
        raise ValueError(
            f"the run needs {lack(need, run.workers.low)}: lower --run.num_workers or --run.cpus_per_worker, add "
            "nodes, or wait longer for them with --run.wait_s"
        )


def refuse_local_store(uri: str) -> None:
    """Raise a ValueError where the MLflow store is a file that not all nodes of the connected cluster can reach."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and tracking.is_local(uri):
        raise ValueError(
            f"the MLflow store {uri!r} is a file on this machine, but the cluster has {nodes} nodes: "
            "start an MLflow server and set MLFLOW_TRACKING_URI"
        )


def _open_mlflow_run(config: TrainConfig, uri: str, earlier: Record | None, inputs: Mapping[str, str]) -> str:
    if earlier is not None and tracking.reopen_run(uri, earlier.mlflow_run_id):
        return earlier.mlflow_run_id
    command = shlex.join(["python", *sys.argv])
    model = config.model
    tags = {"recipe": config.recipe, "seed": str(config.training.seed), **tracking.source_tags(sys.argv[0])}
    tags |= {key: getattr(model, key) for key in NETWORK_FIELDS}
    return tracking.create_run(
        config,
        name=config.run.name or "",
        command=command,
        tags=tags,
        datasets=dataset_digests(config, inputs),
    )


@dataclass
class _End:
    """The end of a run: whether MLflow has all of it."""

    tracked: bool = True


@contextlib.contextmanager
def status_of(uri: str, run_id: str) -> Iterator[_End]:
    """Close the MLflow run with the status that is true: KILLED, too, where it does not have all of it."""
    end = _End()
    try:
        yield end
    except StoppedError:
        tracking.finish_run(uri, run_id, "KILLED")
        raise
    except LeaseLostError:  # the run goes on elsewhere, and its status is for that driver to say
        raise
    except Exception:
        tracking.finish_run(uri, run_id, "FAILED")
        raise
    except BaseException:  # Ctrl-C, or the SystemExit by which a stopped job's driver ends
        tracking.finish_run(uri, run_id, "KILLED")
        raise
    tracking.finish_run(uri, run_id, "FINISHED" if end.tracked else "KILLED")


def prepared(config: TrainConfig) -> tuple[TrainConfig, str]:
    """Prepare `config`: paths that mean the same on every worker, and the storage that its runs lie in."""
    config = with_absolute_paths(config)
    return config, config.run.storage or str(storage.home() / "runs")


def _log_pages(run: Run, checkpoint: str) -> None:
    """Make the run's pages on a worker's node, which has data and GPU. A failure is a warning, and not the run's."""
    task = ray.remote(_make_pages).options(
        num_cpus=run.config.run.cpus_per_worker,
        num_gpus=int(run.use_gpu),
        runtime_env={"env_vars": variables()},
    )
    made = task.remote(run, checkpoint)
    try:
        ray.get(made, timeout=PAGES_LIMIT_S)
    except Exception as error:  # whatever goes wrong with pages, the run is trained
        ray.cancel(made, force=True)
        log.warning("the run's pages could not be made: %s", str(error).strip().splitlines()[-1])


def _make_pages(run: Run, checkpoint: str) -> None:
    from lape_ray.report.build import checkpoint_report  # only here: figures need a second to import
    from lape_ray.report.summary import METRICS, write_run_summary

    uri, run_id = run.tracking_uri, run.mlflow_run_id
    torch.set_num_threads(run.config.run.cpus_per_worker)
    facts = tracking.read_run(uri, run_id, METRICS)
    with storage.opened(checkpoint) as files, tempfile.TemporaryDirectory(prefix="lape-pages-") as folder:
        try:
            drawn = Path(folder, "position_report")
            if checkpoint_report(files, run.config, facts.name, drawn) is not None:
                tracking.log_files(uri, run_id, drawn, "position_report")
        finally:  # one page does not wait for the other to succeed
            summary = write_run_summary(run.config, files, facts, Path(folder, "summary"))
            tracking.log_files(uri, run_id, summary.parent, "summary")
