"""One training run, as its driver sees it.

`fit` is what a job calls. It checks everything that can be checked before workers start, makes or continues the MLflow
run, trains through Ray Train or in this process, and leaves every status right, whatever happens.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from lape_ray import storage, tracking
from lape_ray.cli import typed_command
from lape_ray.cluster.checkpoint_list import best, read_list, recover
from lape_ray.cluster.journal import read_journal, written_command
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_record import RECORD, Record, earlier_run, write_run
from lape_ray.cluster.worker import tell
from lape_ray.config import NETWORK_FIELDS, TrainConfig, replace_fields
from lape_ray.recipes import recipe
from lape_ray.storage import LEASE, LEASE_FILES, Lease, LeaseLostError, leased
from lape_ray.training.checkpoint import Metadata, read_metadata
from lape_ray.training.inputs import dataset_digests, input_digests
from lape_ray.training.loop import StoppedError
from lape_ray.training.preflight import check_before_start, with_absolute_paths

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """The result of a finished run."""

    name: str
    metrics: Mapping[str, float]
    checkpoint: str
    """Address of the best checkpoint; of the newest, where none was evaluated at the model's image size."""
    mlflow_run_id: str
    tracking_uri: str
    tracked: bool
    """True where MLflow has all of it."""
    time: str
    """What its wall time went into, in one line."""

    def summary(self) -> str:
        scores = "  ".join(f"{key} {value:.2f}" for key, value in self.metrics.items() if "acc" in key)
        return (
            f"run {self.name} finished: {scores}\n"
            f"{self.time}\n"
            f"best checkpoint: {self.checkpoint}\n"
            f"MLflow run {self.mlflow_run_id}: {tracking.run_page(self.tracking_uri, self.mlflow_run_id)}"
            + (
                ""
                if self.tracked
                else "\nMLflow does not have all of it: submit the same command again to complete it"
            )
        )


class Place(Protocol):
    """The place where a run's workers compute."""

    @property
    def use_gpu(self) -> bool:
        """Tell whether they compute on GPUs."""

    def train(self, run: Run, lease: Lease) -> None:
        """Train, or complete what was trained before; raises the error of how else it ended."""

    def make_pages(self, run: Run, checkpoint: str) -> None:
        """Make the pages of a trained run. A failure is a warning, and not the run's."""


def fit(config: TrainConfig, *, began: float | None = None) -> FitResult:
    """Train `config` to its end, or continue the unfinished run of the same name.

    Args:
        began: when the command did, in seconds since 1970, from which its wall time counts; None: now.

    Raises:
        ValueError, OSError: bad input, before any worker starts.
        StoppedError: SIGTERM ended it; it left a checkpoint, and the same name goes on from it.
        StorageError: checkpoints cannot be stored any more; the one before the first of them is whole.
        DivergedError: the loss is no finite number.
        WorkersFailedError: workers failed again and again at the same place.
        LeaseHeldError: another driver is at work on this run.
        LeaseLostError: another driver took the run over while this one could not be seen.
    """
    began = time.time() if began is None else began
    name = config.run.name or f"{_what_it_is(config)}-{time.strftime('%Y%m%d-%H%M%S')}"
    config, root = prepared(replace_fields(config, {"run.name": name}))
    uri, folder = tracking.tracking_uri(config), storage.join(root, name)
    check_before_start(config, storage_root=root)
    tracking.check_trackers(config.tracking)
    inputs = input_digests(config)
    earlier_run(config, folder, inputs)  # a name that cannot be used is refused before anything waits
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(leased(folder, f"run {name}"))
        alive = stack.enter_context(written_command(folder, lease.token, began))
        earlier = earlier_run(config, folder, inputs)
        meanwhile = stack.enter_context(ThreadPoolExecutor(1))
        reachable = None
        if earlier is None:  # a run that continues can wait for the server
            reachable = meanwhile.submit(tracking.check_reachable, uri)
        else:
            print(f"run {name} exists and is not finished: continuing it", flush=True)
        place: Place = stack.enter_context(_place(config, folder, uri))
        if reachable is not None:
            reachable.result()  # a Ray took as long to start as MLflow takes to import
        lease.check()
        if config.run.overwrite:
            storage.empty_folder(folder, but=LEASE_FILES)
        recover(folder, tell, before=storage.modified(storage.join(folder, LEASE)))
        run = Run(
            config=config,
            folder=folder,
            lease=lease.token,
            tracking_uri=uri,
            mlflow_run_id=_open_mlflow_run(config, uri, earlier, inputs),
            use_gpu=place.use_gpu,
            inputs=inputs,
        )
        write_run(run, finished=False)
        alive()
        tell(f"run {name}  storage {folder}\nMLflow run {run.mlflow_run_id}: {tracking.ui_command(uri)}")
        return _train_and_conclude(run, lease, place)


def _place(config: TrainConfig, folder: str, uri: str) -> contextlib.AbstractContextManager[Place]:
    """Open the place of the run's workers; imports Ray only where it is wanted."""
    if config.run.in_process:
        from lape_ray.cluster.in_process import in_process

        return in_process(config)
    from lape_ray.cluster.on_ray import on_ray

    return on_ray(config, folder, uri)


def _train_and_conclude(run: Run, lease: Lease, place: Place) -> FitResult:
    """Train, and leave the best checkpoint, the pages and the status in MLflow and in the run's record."""
    uri, run_id = run.tracking_uri, run.mlflow_run_id
    with status_of(uri, run_id) as end:
        before = read_list(run.folder)
        place.train(run, lease)
        lease.check()
        listed = recover(run.folder, log.warning)
        if not listed:
            raise RuntimeError("the training ended without a checkpoint")
        chosen = best(listed) or listed[-1]  # a run may end before its images have the model's size
        checkpoint = storage.join(run.folder, chosen.name)
        with storage.opened(checkpoint) as files:
            meta = read_metadata(files)
            metrics = meta.metrics
            tracked = (
                tracking.send_unsent(run.folder, uri, run_id)
                and (read_list(run.folder) == before or tracking.holds_metric(uri, run_id, "epoch"))
                and tracking.log_model(uri, run_id, files, meta.evaluation, _facts(meta, checkpoint))
            )
            end.tracked = tracked
        journal = read_journal(run.folder)
        of_time = journal.division(now=time.time()).metrics()
        tracking.log_values(uri, run_id, of_time, step=listed[-1].steps_done)
        if run.config.tracking.pages and tracked:
            place.make_pages(run, checkpoint)
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
        time=str(journal.division(now=time.time())),
    )


def _facts(meta: Metadata, checkpoint: str) -> dict[str, str]:
    """Return what tells a checkpoint from others in MLflow's list of models."""
    network = {key: str(getattr(meta.config.model, key)) for key in NETWORK_FIELDS}
    recipe_name = {"recipe": meta.config.recipe} if meta.config.recipe else {}
    return {"checkpoint": checkpoint, **recipe_name, **network, "epochs": str(meta.epochs_done)}


def _what_it_is(config: TrainConfig) -> str:
    """Name the recipe and what of the network is not the recipe's, as in `deit_tiny_lape-join-basic`."""
    if not config.recipe:
        return "run"
    of_recipe = recipe(config.recipe).model
    other = [key for key in NETWORK_FIELDS if getattr(config.model, key) != getattr(of_recipe, key)]
    return "-".join([config.recipe, *(f"{key}-{getattr(config.model, key)}" for key in other)])


def _open_mlflow_run(config: TrainConfig, uri: str, earlier: Record | None, inputs: Mapping[str, str]) -> str:
    if earlier is not None and tracking.reopen_run(uri, earlier.mlflow_run_id):
        return earlier.mlflow_run_id
    command = typed_command()
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
