"""Classify a folder of images: predict.py CHECKPOINT|RUN FOLDER [--csv FILE] [--top 5].

CHECKPOINT is PATH[@RECIPE], as in export.py; RUN is an MLflow run's id; paths may be s3:// addresses. The
classes' names are the checkpoint's, or those in the manifest of data.val. An image that cannot be read is named, in the
CSV's last column too, and the exit code is then 1.
"""

import sys

from lape_ray.cli import ConfigParser, at_least_one, run_job


def main() -> int:
    usage = "%(prog)s CHECKPOINT|RUN FOLDER [options] [--section.field VALUE ...]"
    parser = ConfigParser(usage=usage, description=__doc__)
    add = parser.add_argument
    add("subject", metavar="CHECKPOINT|RUN", help="see above")
    add("folder", help="images are looked for in all folders below it")
    add(
        "--csv",
        metavar="FILE",
        help="write path, classes, probabilities and error, row by row (default: lines on the screen)",
    )
    add("--top", type=at_least_one, default=5, help="classes of an image (default: %(default)s)")
    add("--batch", type=at_least_one, default=32, help="images at a time (default: %(default)s)")
    add("--ema", action="store_true", help="the moving average that our checkpoints hold")
    values = vars(parser.parse_args())
    names = ("subject", "folder", "csv", "top", "batch", "ema")
    subject, folder, file, top, batch, ema = (values.pop(name) for name in names)
    from tqdm import tqdm

    from lape_ray.inference.export import open_predictor
    from lape_ray.inference.predict import find_images, predict_files, with_csv
    from lape_ray.storage import local

    paths = find_images(local(folder))
    predictor, _ = open_predictor(subject, values, ema=ema)
    predictions = predict_files(predictor, paths, top=top, batch_size=batch)
    if file is not None:
        predictions = with_csv(predictions, file, top=min(top, len(predictor.classes)))
    failed = 0
    for one in tqdm(predictions, total=len(paths), disable=None):
        if one.error is not None:
            failed += 1
            tqdm.write(f"skipped: {one.error}", file=sys.stderr)
        elif file is None:
            tqdm.write(f"{one.path}  " + "  ".join(f"{name} {p:.3f}" for name, p in one.top))
    print(f"{len(paths) - failed} images classified, {failed} skipped" + (f"; {file}" if file else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    run_job(main)
