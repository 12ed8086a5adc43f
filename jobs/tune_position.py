"""Find the best position embedding, join and hyper-parameters: tune_position.py SPACE RECIPE [options].

Any --section.field option fixes that field, also one that the space goes over. The same command continues a search
that was interrupted, and shows the results of one that is finished.

python jobs/tune_position.py joins vit_lite_7_4_lape --seeds 3 --data.train c10_train.beton --data.val c10_val.beton
python jobs/tune_position.py free deit_tiny_lape --space 'optim.lr=loguniform(1e-4,3e-3)' --trials 16 --schedule asha
"""

from lape_ray.cli import run_job
from lape_ray.search.options import parse_search_options


def main() -> None:
    options, overrides = parse_search_options(__doc__)
    from lape_ray.search.command import run_command  # after parsing, so that --help is instant

    print(run_command(**options, overrides=overrides))


if __name__ == "__main__":
    run_job(main)
