"""Track runs in MLflow, which nothing else imports.

    mlflow   runs, metrics, files and models
    ui_view  the opening view of MLflow's list of runs

The names of `mlflow` are handed on here. mlflow itself takes seconds to import, and is imported where a
connection is made.
"""

from lape_ray.tracking.mlflow import (
    Datasets,
    RunFacts,
    Status,
    Tracker,
    check_reachable,
    create_run,
    download_model,
    finish_run,
    git_commit,
    is_local,
    log_files,
    log_model,
    log_pyfunc,
    log_values,
    read_run,
    reopen_run,
    run_page,
    serving_error,
    source_tags,
    tag_run,
    tracking_uri,
    ui_command,
)

__all__ = [
    "Datasets",
    "RunFacts",
    "Status",
    "Tracker",
    "check_reachable",
    "create_run",
    "download_model",
    "finish_run",
    "git_commit",
    "is_local",
    "log_files",
    "log_model",
    "log_pyfunc",
    "log_values",
    "read_run",
    "reopen_run",
    "run_page",
    "serving_error",
    "source_tags",
    "tag_run",
    "tracking_uri",
    "ui_command",
]
