"""The opening view of MLflow's list of runs: the columns and curves that tell position embeddings apart, first.

It is a saved view of the experiment, which MLflow keeps in one of its tags; a person can choose it in the list, change
it, or leave it. Standard library only.
"""

from __future__ import annotations

import json

NAME = "lape_ray"
TAG = f"mlflow.sharedViewState.{NAME}"
QUERY = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={NAME}"
COLUMNS = (
    "attributes.`Duration`",
    "metrics.`best/acc1`",
    "tags.`join`",
    "tags.`position`",
    "tags.`seed`",
    "tags.`variant`",
)
CURVES = ("val/acc1", "val/loss", "train/loss", "val_ema/acc1", "train/images_per_s", "train/lr")
_SECTION = "lape_ray-curves"


def tags() -> dict[str, str]:
    """Return the tags that mark an experiment: its kind, what it is, and the view."""
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": "Vision transformers by position embedding and join, trained by lape_ray. The saved "
        "view *Position embeddings* has their curves and the columns that tell them apart.",
        TAG: _saved_view(),
    }


def _saved_view() -> str:
    """Return the view as MLflow 3 keeps it; a version that does not know it opens its own."""
    state = {
        "selectedColumns": list(COLUMNS),
        "runsHiddenMode": "FIRST_20_RUNS",
        "isAccordionReordered": True,  # else sections are sorted by name
        "compareRunCharts": [_curve(metric) for metric in CURVES],
        "compareRunSections": [
            {"uuid": _SECTION, "name": "curves", "display": True, "isReordered": False, "deleted": False,
             "isGenerated": False},
        ],
    }  # fmt: skip
    return json.dumps(
        {"name": "Position embeddings", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    )


def _curve(metric: str) -> dict[str, object]:
    return {
        "uuid": f"lape_ray-{metric}",
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "metricSectionId": _SECTION,
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": False,
        "displayName": metric,
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
        "ignoreOutliers": False,
        "range": {},
    }
