"""The pages of a trained run in MLflow: its summary and its position report.

    python -m lape_ray.cluster.pages RUN_FOLDER CHECKPOINT_FOLDER [--trust-plugin=SHA256]

makes them (again). A command that has trained does that as it ends, in a process that outlives it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lape_ray import storage, tracking
from lape_ray.cluster.run import Run
from lape_ray.config import TrainConfig, replace_fields
from lape_ray.values.plugin import TRUST, trusted
from lape_ray.values.redaction import redacted

TAG = "pages"
"""The tag of a run whose pages are missing, which says why."""
_TRUST = "--trust-plugin="


def make_pages(config: TrainConfig, uri: str, run_id: str, checkpoint: str) -> None:
    """Draw the pages of a run from the checkpoint at that address, and put them into MLflow."""
    import torch  # only here, as are the figures: a process that hands this over needs neither

    from lape_ray.cluster.journal import read_journal
    from lape_ray.report.build import checkpoint_report
    from lape_ray.report.summary import METRICS, write_run_summary

    torch.set_num_threads(config.run.cpus_per_worker)
    facts = tracking.read_run(uri, run_id, METRICS)
    with storage.opened(checkpoint) as files, tempfile.TemporaryDirectory(prefix="lape-pages-") as folder:
        try:
            drawn = Path(folder, "position_report")
            if checkpoint_report(files, config, facts.name, drawn):
                tracking.log_files(uri, run_id, drawn, "position_report")
        finally:  # one page does not wait for the other to succeed
            division = read_journal(checkpoint.rpartition("/")[0]).division(now=time.time())
            summary = write_run_summary(config, files, facts, Path(folder, "summary"), time=division)
            tracking.log_files(uri, run_id, summary.parent, "summary")


def hand_over(run: Run, checkpoint: str) -> None:
    """Let a process make the pages that outlives this one; what it says is in a file that goes with its success."""
    log = tempfile.NamedTemporaryFile(prefix="lape-pages-", suffix=".log", delete=False)  # noqa: SIM115
    plugin = run.config.model.plugin
    trust = [] if plugin is None else [f"{_TRUST}{plugin.sha256}"]
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, run.folder, checkpoint, *trust, log.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
            env={**os.environ, "MLFLOW_TRACKING_URI": run.tracking_uri},
        )
    print(
        f"process {process.pid} makes the run's pages, which MLflow has soon; its log is {log.name}",
        flush=True,
    )


def main() -> None:
    """Make the pages of the run whose record is in the given folder; the log file goes where all is well."""
    os.nice(10)  # the command that handed this over is still ending
    from lape_ray.cluster.run_record import read_run  # imports torch

    folder, checkpoint, *more = sys.argv[1:]
    log = [word for word in more if not word.startswith(_TRUST)]
    config, run_id = read_run(folder)
    plugin = config.model.plugin
    if plugin is not None and f"{_TRUST}{plugin.sha256}" in more:
        config = replace_fields(config, {"model.plugin": trusted(plugin, TRUST)})
    uri = tracking.tracking_uri(config)
    try:
        make_pages(config, uri, run_id, checkpoint)
    except Exception as error:
        why = redacted(f"{type(error).__name__}: {error}")
        tracking.tag_run(uri, run_id, {TAG: f"could not be made: {why}"})
        raise
    for name in log:
        Path(name).unlink()


if __name__ == "__main__":
    main()
