"""`lape-ray evaluate`, from a checkout or from what `ray job submit --working-dir .` sends."""

from lape_ray.cli import run_job
from lape_ray.commands.evaluate import main

if __name__ == "__main__":
    run_job(main)
