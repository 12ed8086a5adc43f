"""The page of position embeddings: pictures of every view, tables of every number, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lape_ray.report import figures
from lape_ray.report.page import Page
from lape_ray.report.position import PositionView
from lape_ray.report.robustness import Robustness
from lape_ray.report.robustness_page import write_robustness

HTML = "position_report.html"
ROWS = "One row a network, or a stage of it; one column a layer."
STAGES = (
    "A network of several stages has a row for each, on its own grid, and the framed patch is the one that holds the "
    "first stage's. LaPE's w passes from stage to stage through the tokens' own merging. So does a table that is added "
    "to the tokens, and its later rows are drawn as if all tokens of an image had the same deviation before a merging. "
    "Bias and rotation are those of a window."
)


def write_position_report(
    views: Sequence[PositionView],
    folder: Path,
    *,
    token: tuple[int, int] | None = None,
    robustness: Sequence[Robustness] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write figures (PNG and SVG) and one self-contained page into `folder`; returns the page.

    Args:
        token: (row, column) of the patch whose maps are drawn; None: the centre of each grid.
        robustness: a figure, a table and a CSV file of accuracy where it was measured.
        notes: what the reader must know, such as a part that is left out and why.

    Raises:
        ValueError: the token is not on a grid, or no view has any position embedding.
    """
    if not any(one.shown for one in views):
        labels = ", ".join(one.label for one in views)
        why = "what there is depends on the image, and none is given (--images)"
        if not any(one.by_image for one in views):
            why = "position, bias and rotary are none"
        raise ValueError(f"{labels}: there is no position to report, for {why}")
    for one in views:
        one.patch(token)
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(
        "Position embeddings",
        "As attention sees them, layer by layer. All maps of a figure share one colour scale.",
    )
    page.table(
        ("network", "grid", "what it is"),
        [(one.label, f"{one.grid[0]} x {one.grid[1]}", one.description) for one in views],
    )
    if by_image := [one.label for one in views if one.by_image]:
        page.note(
            f"{', '.join(by_image)}: a part of position depends on the image. It has no map; how strongly layers use "
            "it is measured on images."
        )
    for text in notes:
        page.note(text)
    _maps(page, views, folder, token)
    _strength(page, views, folder)
    if robustness:
        write_robustness(page, robustness, folder)
    target = folder / HTML
    target.write_text(page.html())
    return target


def _maps(page: Page, views: Sequence[PositionView], folder: Path, token: tuple[int, int] | None) -> None:
    if (figure := figures.token_figure(views, token)) is not None:
        page.heading("One patch against all patches")
        page.text(
            "Cosine similarity of the embeddings' rows. Where position is added to the tokens, attention sees it "
            "through the layer's common LayerNorm (eq. 6-7 of the LaPE paper: l2 LN(w), and l2 changes no cosine); "
            "with LaPE it is the layer's own LN_w(w)."
            + (f" {STAGES}" if any(one.stride > 1 for one in views) else "")
        )
        page.figure(figures.save(figure, folder, "token"), ROWS)
    if (figure := figures.class_figure(views)) is not None:
        page.heading("The tokens before the patches against all patches")
        page.figure(figures.save(figure, folder, "class_token"), ROWS)
    if (figure := figures.matrix_figure(views)) is not None:
        page.heading("All tokens against all tokens")
        page.figure(
            figures.save(figure, folder, "matrix"), "Rows and columns are tokens, patches in reading order."
        )
    for index, one in enumerate(views):
        if (figure := figures.bias_figure(one, token)) is not None:
            page.heading(f"Bias on attention: {one.label}")
            page.figure(
                figures.save(figure, folder, f"bias_{index + 1}"), "One row a head, one column a layer."
            )
    if (figure := figures.rotation_figure(views, token)) is not None:
        page.heading("Rotation")
        page.figure(figures.save(figure, folder, "rotation"), "1 where query and key are turned alike.")


def _strength(page: Page, views: Sequence[PositionView], folder: Path) -> None:
    figure = figures.strength_figure(views)
    if figure is None:
        return
    page.heading("How strongly each layer uses position")
    page.text(
        "Left: the length of attention's input that is position over the length that is token. Right: the share of a "
        "query's attention that goes to other keys when the layer is given no position at all (0: position does "
        "nothing, 1: all of it moves). Means over images, heads and patches. Position is the embedding that the "
        "network adds, with the constant of its LayerNorm; what earlier layers wrote about it counts as token."
    )
    page.figure(
        figures.save(figure, folder, "strength"), "Solid: patches; dashed and dotted: the tokens before them."
    )
    rows = []
    for one in views:
        if one.strength is None:
            continue
        for name, values_LN in (("ratio", one.strength.norm_ratio_LN), ("moved", one.strength.moved_LN)):
            if values_LN is not None:
                patches = [f"{value:.3f}" for value in values_LN[:, one.num_prefix :].mean(1).tolist()]
                rows.append((one.label, name, *[""] * one.first_layer, *patches))
    depth = max(len(row) for row in rows) - 2
    header = ("network", "of patches", *(f"layer {layer + 1}" for layer in range(depth)))
    page.table(header, [(*row, *[""] * (depth + 2 - len(row))) for row in rows])
