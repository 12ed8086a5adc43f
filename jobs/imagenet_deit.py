"""Train one recipe: imagenet_deit.py RECIPE [--section.field VALUE ...]."""

from lape_ray.cli import parse, run_job


def main() -> None:
    config = parse(None, description="Train a vision transformer on a Ray cluster.")
    from lape_ray.cluster.launch import fit  # after parsing, so that --help needs no torch and no ray

    print(fit(config).summary())


if __name__ == "__main__":
    run_job(main)
