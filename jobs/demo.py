"""`lape-ray demo` of this checkout: `make demo` trains one network, `make demo-tune` compares position embeddings."""

from functools import partial
from pathlib import Path

from lape_ray.cli import run_job
from lape_ray.commands import demo

main = partial(demo.main, project=Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    run_job(main)
