"""Track runs: in MLflow, which nothing else imports, and in TensorBoard's event files.

    tracker      the interface `Tracker`, and `open_tracker`, which opens rank 0's
    mlflow/      the driver's run, and the tracker that logs into it
    tensorboard  a tracker that writes event files
    sender       the queue behind both, which loses nothing and sends nothing twice
    unsent       the file of what waits, in the run's folder
    failures     errors of a service, in one line
    source       tags that name the version of the code
    ui_view      the opening view of MLflow's list of runs

Other rooms use the names below. mlflow itself takes seconds to import, and is imported where a connection is made.
"""

from lape_ray.tracking.mlflow.artifacts import download_model, log_files, log_model, log_pyfunc
from lape_ray.tracking.mlflow.client import check_reachable, is_local, serving_error, tracking_uri, ui_command
from lape_ray.tracking.mlflow.runs import (
    Datasets,
    RunFacts,
    Status,
    create_run,
    finish_run,
    log_values,
    read_run,
    reopen_run,
    run_page,
    tag_run,
)
from lape_ray.tracking.mlflow.tracker import send_unsent
from lape_ray.tracking.source import git_commit, source_tags
from lape_ray.tracking.tracker import Tracker, check_trackers, open_tracker

__all__ = [
    "Datasets",
    "RunFacts",
    "Status",
    "Tracker",
    "check_reachable",
    "check_trackers",
    "create_run",
    "download_model",
    "finish_run",
    "git_commit",
    "is_local",
    "log_files",
    "log_model",
    "log_pyfunc",
    "log_values",
    "open_tracker",
    "read_run",
    "reopen_run",
    "run_page",
    "send_unsent",
    "serving_error",
    "source_tags",
    "tag_run",
    "tracking_uri",
    "ui_command",
]
