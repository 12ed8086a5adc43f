"""The model card of an exported checkpoint: README.md with what the hub reads in its head."""

from __future__ import annotations

from pathlib import Path

from lape_ray.inference.evaluate import seen_as
from lape_ray.inference.predict import Predictor
from lape_ray.inference.timm import not_for_timm
from lape_ray.model import resolve
from lape_ray.recipes import RECIPES
from lape_ray.training.checkpoint import differences

CODE = "lape_ray"
_PATHS = ("training.init_from", "optim.teacher")
CITATION = """\
@inproceedings{yu2023lape,
  title     = {{LaPE}: Layer-adaptive Position Embedding for Vision Transformers with Independent Layer Normalization},
  author    = {Yu, Runyi and Wang, Zhennan and Wang, Yinhuai and Li, Kehan and Liu, Chang and Duan, Haoyi and
               Ji, Xiangyang and Chen, Jie},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  pages     = {5886--5896},
  year      = {2023}
}"""


def model_card(predictor: Predictor, name: str, *, ema: bool = False) -> str:
    """Return the card of the repository `name`: what the network is, its figures, and how to load and evaluate it.

    No path of this machine is in it.

    Args:
        ema: whether the weights are their moving average.
    """
    parts = [
        _head(predictor),
        f"# {name.partition('/')[2]}",
        _about(predictor, ema=ema),
        _figures(predictor, ema=ema),
        _loading(predictor, name),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(predictor: Predictor) -> str:
    library = "timm" if not_for_timm(predictor.config) is None else CODE
    tags = "\n".join(
        f"- {tag}" for tag in ("image-classification", "vision-transformer", "position-embedding", CODE)
    )
    return f"---\nlibrary_name: {library}\npipeline_tag: image-classification\ntags:\n{tags}\n---"


def _about(predictor: Predictor, *, ema: bool) -> str:
    config, spec = predictor.config, resolve(predictor.config.model)
    model = config.model
    rows = {
        "network": f"{model.variant}, {sum(p.numel() for p in predictor.model.network.parameters()):,} parameters"
    }
    rows["position embedding"] = model.position + (f", join {model.join}" if model.position != "none" else "")
    if model.bias != "none":
        rows["position bias"] = f"{model.bias}, join {model.bias_join}"
    if model.rotary != "none":
        rows["rotary position"] = model.rotary
    rows["classes"] = str(spec.num_classes)
    if config.recipe in RECIPES and predictor.trained is not None:
        rows["recipe"] = f"`{config.recipe}`"
        changed = differences(RECIPES[config.recipe](), config)
        if shown := [f"`{line}`" for line in changed if not line.startswith(_PATHS)]:
            rows["changed in it"] = "<br>".join(shown)
    if predictor.trained is not None:
        rows["trained"] = f"{predictor.trained.epochs_done} epochs, {predictor.trained.steps_done:,} steps"
    if ema:
        rows["weights"] = "their moving average"
    for split, path in (("training data", config.data.train), ("validation data", config.data.val)):
        if path:
            rows[split] = f"`{Path(path).stem}`"
    rows["evaluation sees"] = seen_as(config)
    rows["normalisation"] = (
        f"mean {config.data.mean}, standard deviation {config.data.std}, of values in 0..1"
    )
    return _table(("what", "value"), rows)


def _figures(predictor: Predictor, *, ema: bool) -> str:
    start = "val_ema/" if ema else "val/"
    metrics = predictor.trained.evaluation if predictor.trained is not None else {}
    rows = {
        key.removeprefix(start): f"{value:.4g}" for key, value in metrics.items() if key.startswith(start)
    }
    if not rows:
        return ""
    what = f"On the whole validation data `{Path(predictor.config.data.val).stem}` (accuracies in percent):"
    return f"## Figures\n\n{what}\n\n{_table(('metric', 'value'), rows)}"


def _table(head: tuple[str, str], rows: dict[str, str]) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _loading(predictor: Predictor, name: str) -> str:
    reason = not_for_timm(predictor.config)
    timm = (
        f'With timm:\n\n```python\nimport timm\n\nmodel = timm.create_model("hf-hub:{name}", pretrained=True)\n```'
        if reason is None
        else f"timm cannot load it, for {reason}."
    )
    trust = "" if predictor.config.model.plugin is None else " --trust-plugin"
    return (
        f"## Use\n\n{timm}\n\nWith {CODE} (`pip install {CODE}[hub]`), which takes the network from config.json:\n\n"
        f"```\n{CODE.replace('_', '-')} evaluate hf-hub:{name} --data.val VAL.beton{trust}\n"
        f"{CODE.replace('_', '-')} predict hf-hub:{name} FOLDER_OF_IMAGES{trust}\n```\n\n"
        f"`--training.init_from hf-hub:{name}` starts a training from it."
    )
