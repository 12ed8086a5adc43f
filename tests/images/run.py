"""`make test-images`: builds all images, brings the compose stack up, trains the demo on it, and looks at everything.

Needs root on a Debian 12 with buildah, podman, runc, netavark, aardvark-dns, iptables, debootstrap and chromium
(`make test-images` installs them); no Docker engine. Takes about 15 minutes and 15 GB the first time.

  --work FOLDER   images, logs and pictures (default: /var/tmp/lape-images)
  --torch WORDS   another CPU build of PyTorch than the lock's, if its index cannot be reached, such as
                  "torch==2.13.0+cpu torchvision==0.28.0"
  --arm64         build the trainer alone, for arm64 in an emulator, and try it (1 hour; needs qemu-user-static)
  --gpu           build the GPU image as well (20 GB more), and see what is in it
  --keep          leave the stack up
  --reuse         use the images and the stack that an earlier --keep left
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from images import EXTRA, IMAGES, ROOT, build, configure, emulated_arm64, make_base, size
from stack import Stack


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/lape-images"))
    parser.add_argument("--torch", default="")
    parser.add_argument("--arm64", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--reuse", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    configure(options.work)
    if options.arm64:
        with emulated_arm64():
            base = make_base(options.work, "arm64")
            arguments = {"BASE_IMAGE": base, "TORCH": options.torch, "REVISION": revision()}
            build("arm64", options.work, arguments)
            print(f"the arm64 image holds {contents_of_the_arm64_image()}", flush=True)
        return
    if not options.reuse:
        make_base(options.work)
        for name in IMAGES:
            build(
                name,
                options.work,
                {"TORCH": options.torch, "REVISION": revision()} if name == "trainer" else {},
            )
    if options.gpu:
        build("gpu", options.work, {"FLAVOR": "gpu", "REVISION": revision()})
        print(f"the GPU image holds {contents_of_the_gpu_image()}", flush=True)
    for tag, _ in IMAGES.values():
        print(f"{tag}: {size(tag)}")
    stack = Stack(options.work, fresh=not options.reuse)
    failed = []
    try:
        stack.up(fresh=not options.reuse)
        for check in CHECKS:
            start = time.monotonic()
            try:
                said = check(stack)
            except Exception as error:  # the other checks say more about what is wrong
                failed.append(check.__name__)
                said = f"FAILED: {type(error).__name__}: {error}"
            print(
                f"{check.__name__.replace('_', ' ')}: {said} ({time.monotonic() - start:.0f} s)", flush=True
            )
    finally:
        stack.save_logs()
        if not options.keep:
            stack.down()
    print(f"{len(CHECKS) - len(failed)} passed, {len(failed)} failed")
    print(f"after {time.monotonic() - began:.0f} s; logs and pictures: {options.work}")
    sys.exit(bool(failed))


# A container that may write nowhere but in /tmp, without rights or network.
HARDENED = [
    *("podman", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--network", "none"),
]


def revision() -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def contents_of_the_gpu_image() -> str:
    """PyTorch with CUDA, Triton and the C compiler that it needs, and all that training imports."""
    script = (
        "import os, shutil, torch, torchvision, triton, ffcv, ray.train.torch, mlflow, _lape_ray_native\n"
        "import lape_ray.cluster.launch\n"
        "assert os.getuid() == 1000 and shutil.which('gcc') and not shutil.which('g++')\n"
        "assert torch.version.cuda and 'sm_90' in torch.cuda.get_arch_list(), torch.cuda.get_arch_list()\n"
        "assert torch.distributed.is_nccl_available()\n"
        "print(f'torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}, '\n"
        "      f'NCCL {torch.cuda.nccl.version()}')\n"
    )
    command = [*HARDENED, EXTRA["gpu"][0], "python", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the GPU image is not what it should be:\n{done.stderr}")
    return f"{done.stdout.strip()}, {size(EXTRA['gpu'][0])}"


def contents_of_the_arm64_image() -> str:
    """A decoder that agrees with this machine's to the bit, a writer of data, and a training."""
    crops = "tests/images/crops.py tests/data/photographs/*.jpg"
    here = ["bash", "-c", f"{sys.executable} {crops}"]
    expected = subprocess.run(here, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    script = (
        f"set -e; uname -m; python {crops}\n"
        "for split in train val; do python app/jobs/write_beton.py digits /tmp/$split.beton --split $split; done\n"
        "python app/jobs/imagenet_deit.py smoke --run.num_workers 0 --data.train /tmp/train.beton "
        "--data.val /tmp/val.beton\n"
        "python -c 'import torch, torchvision; print(\"torch\", torch.__version__, torchvision.__version__)'\n"
    )
    command = [*HARDENED, "-v", f"{ROOT}/tests:/tests:ro", "-w", "/", "-e", "LAPE_RAY_HOME=/tmp/home"]
    command += ["-e", "LAPE_RAY_CACHE=/tmp/cache", EXTRA["arm64"][0], "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    trained = re.search(r"finished: (val/acc1 \S+)", done.stdout)
    if done.returncode or not done.stdout.startswith(f"aarch64\n{expected}") or not trained:
        raise SystemExit(
            f"the arm64 image is not what it should be:\n{expected}\n{done.stdout}\n{done.stderr}"
        )
    return f"{done.stdout.splitlines()[-1]}, {size(EXTRA['arm64'][0])}, {trained[1]}"


def images_hold_no_compiler_and_no_root(stack: Stack) -> str:
    for name in ("trainer", "mlflow", "s3"):
        tag = IMAGES[name][0]
        script = "id -u; command -v gcc g++ cc c++ make || true; command -v python"
        login = ["-c"] if name == "s3" else ["-lc"]  # KubeRay may ask for a login shell
        user, *rest = stack.run([*HARDENED, tag, "bash", *login, script]).split()
        assert user == "1000", f"{tag} runs as {user}"
        assert rest == ["/opt/venv/bin/python"], f"{tag}: {rest}"
    ray = stack.run(
        ["podman", "run", "--rm", IMAGES["trainer"][0], "bash", "-lc", "ray --version; python --version"]
    )
    return " ".join(ray.split())


def two_nodes_and_a_head(stack: Stack) -> str:
    nodes = stack.wait_for_nodes(3)
    return f"{nodes} nodes"


def strangers_are_refused(stack: Stack) -> str:
    jobs, mlflow = f"{stack.ray}/api/jobs/", f"{stack.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    wrong = {"Authorization": "Bearer wrong"}
    found = {
        "jobs": stack.status(jobs),
        "jobs, wrong token": stack.status(jobs, wrong),
        "jobs, POST": stack.status(jobs, method="POST"),
        "mlflow": stack.status(mlflow),
        "mlflow, wrong password": stack.status(mlflow, stack.basic("admin", "wrong-password")),
        "mlflow, a job makes a user": stack.status(
            f"{stack.mlflow}/api/2.0/mlflow/users/create", stack.trainer, "POST"
        ),
        "mlflow, other host": stack.status(mlflow, {**stack.admin, "Host": "evil.example"}),
    }
    assert all(code in (401, 403) for code in found.values()), found
    assert stack.status(jobs, stack.token) == 200
    assert stack.status(mlflow, stack.admin) == 200
    assert stack.status(mlflow, stack.trainer) == 200
    return ", ".join(f"{what} {code}" for what, code in found.items())


def the_demo_trains_on_two_nodes(stack: Stack) -> str:
    stack.submit_demo("--run.name", "stack-demo")
    run = stack.mlflow_run()
    assert run["info"]["status"] == "FINISHED", run["info"]
    metrics = {one["key"]: one["value"] for one in run["data"]["metrics"]}
    assert metrics["best/acc1"] > 95, metrics
    assert {"train/loss", "train/step_s", "train/data_wait_s", "val/acc1"} <= set(metrics)
    staged = stack.staged_copies()
    assert len(staged) == 2 and all(staged.values()), (
        f"both containers stage the data for themselves: {staged}"
    )
    return f"top-1 {metrics['best/acc1']:.2f}, data staged on {len(staged)} containers"


def a_finished_name_is_refused_by_its_record_on_s3(stack: Stack) -> str:
    output = stack.submit_demo("--run.name", "stack-demo", ok=False)
    assert "run 'stack-demo' is finished already" in output, output[-500:]
    return "refused"


def postgres_and_s3_hold_it(stack: Stack) -> str:
    query = "select count(*) from metrics m join runs r using (run_uuid) where r.name='stack-demo'"
    rows = int(stack.execute("postgres", ["psql", "-U", "mlflow", "-d", "mlflow", "-tAc", query]))
    assert rows > 100, rows
    code = "from lape_ray import storage; print(*(o.address for o in storage.listing('s3://{}')), sep='\\n')"
    kept = stack.execute("ray-head", ["python", "-c", code.format("lape/runs/stack-demo")]).split()
    artifacts = stack.execute("ray-head", ["python", "-c", code.format("mlflow/artifacts")]).split()
    assert any(name.endswith("run.json") for name in kept), kept
    assert any(name.endswith("model.safetensors") for name in kept), kept
    assert any(name.endswith("artifacts/model/model.safetensors") for name in artifacts), artifacts
    assert any(name.endswith("summary/summary.html") for name in artifacts), artifacts
    return f"{rows} metric rows, {len(kept)} objects of the run, {len(artifacts)} artifacts"


def prometheus_could_read_our_metrics(stack: Stack) -> str:
    """While a second run trains: gauges live as long as the workers that set them."""
    wanted = ("ray_lape_images_per_second", "ray_lape_loss", "ray_lape_step_seconds", "ray_lape_data_wait_seconds",
              "ray_lape_checkpoint_seconds")  # fmt: skip
    both = [
        rf'(?m)^{wanted[0]}{{.*rank="{rank}"' for rank in range(2)
    ]  # each node's page has those of its worker
    with stack.demo_in_background("--run.name", "watched"):
        stack.scrape_until([*wanted, *both], timeout_s=900)
    return f"{len(wanted)} gauges, of both ranks"


def a_browser_shows_run_and_charts(stack: Stack) -> str:
    run = stack.mlflow_run()["info"]
    page = f"#/experiments/{run['experiment_id']}/runs/{run['run_id']}"
    stack.picture("run.png", f"{page}?workflowType=machine_learning", ["stack-demo", "best/acc1", "Finished"])
    stack.picture(
        "charts.png",
        f"{page}/model-metrics?workflowType=machine_learning",
        ["main-svg", "(train/images_per_s)"],
    )
    return "run.png, charts.png"


def no_secret_is_anywhere(stack: Stack) -> str:
    places = stack.places_where_secrets_could_be()
    for name, text in places.items():
        for variable, secret in stack.secrets.items():
            assert secret not in text, f"{variable} is in {name}"
    return f"{len(places)} places, {sum(map(len, places.values())) / 1e6:.1f} MB"


CHECKS: list[Callable[[Stack], str]] = [
    images_hold_no_compiler_and_no_root,
    two_nodes_and_a_head,
    strangers_are_refused,
    the_demo_trains_on_two_nodes,
    a_finished_name_is_refused_by_its_record_on_s3,
    postgres_and_s3_hold_it,
    prometheus_could_read_our_metrics,
    a_browser_shows_run_and_charts,
    no_secret_is_anywhere,
]

if __name__ == "__main__":
    os.nice(5)
    main()
