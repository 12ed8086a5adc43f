"""Find the best position embedding, join and hyper-parameters: tune_position.py SPACE RECIPE [options].

Any --section.field option fixes that field, also one that the space goes over. The same command continues a search
that was interrupted, and shows the results of one that is finished.

python jobs/tune_position.py joins vit_lite_7_4_lape --seeds 3 --data.train c10_train.beton --data.val c10_val.beton
python jobs/tune_position.py free deit_tiny_lape --space 'optim.lr=loguniform(1e-4,3e-3)' --trials 16 --schedule asha
"""

from lape_ray.cli import ConfigParser, run_job

SPACES = "positions, paper_table7, paper_table2, joins, recipe, or free (nothing but --space)"
KINDS = "choice(a,b,...), uniform(low,high), loguniform(low,high) or randint(low,high)"
SCHEDULES = ("full", "asha", "hyperband", "pbt")


def main() -> None:
    usage = "%(prog)s SPACE RECIPE [--space FIELD=KIND(...)] [options] [--section.field VALUE ...]"
    parser = ConfigParser(usage=usage, description=__doc__)
    add = parser.add_argument
    add("space", metavar="SPACE", help=SPACES)
    add("recipe", metavar="RECIPE", help="the config that every trial starts from")
    add(
        "--space",
        dest="axes",
        action="append",
        default=[],
        metavar="FIELD=KIND(...)",
        help=f"an axis: {KINDS}",
    )
    add(
        "--sample", choices=("grid", "random", "tpe"), help="how points are chosen (default: grid, or random)"
    )
    add(
        "--schedule",
        default="full",
        choices=SCHEDULES,
        help="which trials train to the end (default: %(default)s)",
    )
    add("--trials", type=int, metavar="N", help="points to try (default: the whole grid, or 16)")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="seeds of every point, from training.seed on (default: 1)",
    )
    add("--metric", default="val/acc1", help="what is compared (default: %(default)s)")
    add(
        "--grace",
        type=int,
        default=1,
        metavar="EPOCHS",
        help="that every trial gets; between generations of pbt",
    )
    add("--eta", type=int, default=3, metavar="N", help="one in N goes on, or is replaced (default: 3)")
    add(
        "--concurrent",
        type=int,
        metavar="N",
        help="trials at once (default: as many as the cluster has room for)",
    )
    add("--gpus-per-worker", type=float, metavar="SHARE", help="such as 0.25 for small networks (default: 1)")
    add("--list", action="store_true", help="print the points of the space and exit")
    options, overrides = parser.parse_job()
    from lape_ray.search.command import run_command  # after parsing, so that --help is instant

    print(run_command(**options, overrides=overrides))


if __name__ == "__main__":
    run_job(main)
