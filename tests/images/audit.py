"""`make audit`: what is known to be weak in pinned packages, Dockerfiles and manifests. Findings end it with 1.

What is allowed stands in ALLOWED_*, each with its reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
BIN = ROOT / ".audit/bin"
ALLOWED_CHECKS = {
    "CKV_DOCKER_7": "the base image is an argument, whose default has a tag",
    "CKV_K8S_11": "no CPU limit on training's pods would be better still; where set, it is the size of the node",
    "CKV_K8S_14": "a tag is fixed; digests are set where images are published",
    "CKV_K8S_15": "images have fixed tags, and nodes without a registry must be able to use theirs",
    "CKV_K8S_35": "boto3 and MLflow read credentials from the environment",
    "CKV_K8S_40": "1000 is the images' user; files on volumes belong to it",
    "CKV_K8S_43": "see CKV_K8S_14",
    "CKV_K8S_8": "KubeRay adds probes to Ray's pods; jobs have none",
    "CKV_K8S_9": "see CKV_K8S_8",
    "CKV2_K8S_6": "each pod is covered by the namespace's default-deny policy, which this check does not see",
    "CKV_K8S_21": "the namespace is set by kustomize; pods taken out of Ray's objects have none",
}


def checkov() -> int:
    """Of all rendered overlays, with Ray's pods taken out of the objects that it does not know."""
    from helpers.manifests import K8S, pods, render

    with tempfile.TemporaryDirectory() as folder:
        for name in ("overlays/local", "overlays/gpu", "overlays/local/jobs", "overlays/gpu/jobs"):
            resources = render(K8S / name)
            known = [one for one in resources if not one["apiVersion"].startswith("ray.io/")]
            ray = [one for one in resources if one["apiVersion"].startswith("ray.io/")]
            taken = []
            for _, pod in pods(ray):
                pod["metadata"].setdefault("namespace", "lape-ray")
                taken.append(pod)
            Path(folder, f"{name.replace('/', '-')}.yaml").write_text(yaml.safe_dump_all([*known, *taken]))
        command = [str(BIN / "checkov"), "--compact", "--quiet", "--skip-download", "-o", "json"]
        command += ["--skip-check", ",".join(ALLOWED_CHECKS)]
        found = 0
        for kind, place in (("kubernetes", folder), ("dockerfile", str(ROOT / "docker"))):
            done = subprocess.run(
                [*command, "--framework", kind, "-d", place], capture_output=True, text=True
            )
            report = json.loads(done.stdout)
            summary = report.get("summary", report)
            for one in report.get("results", {}).get("failed_checks", []):
                found += 1
                print(f"  {one['check_id']} {one['check_name']}: {one['resource']}")
            print(f"checkov {kind}: {summary.get('passed', 0)} passed, {summary.get('failed', 0)} failed")
    return found


def packages() -> int:
    """Known weaknesses of what the locks pin."""
    found = 0
    for lock in ("requirements.lock", "docker/mlflow.lock", "docker/s3.lock"):
        command = [str(BIN / "pip-audit"), "--no-deps", "--disable-pip", "-f", "json", "-r", str(ROOT / lock)]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            report = json.loads(done.stdout)
        except ValueError:
            print(f"pip-audit {lock}: no answer: {done.stderr.strip().splitlines()[-1]}")
            found += 1
            continue
        unknown = [one for one in report["dependencies"] if "skip_reason" in one]
        if unknown:  # a mirror of PyPI may have no advisories
            print(f"  {len(unknown)} could not be looked up, the first is {unknown[0]['skip_reason']}")
            found += len(unknown)
        weak = [one for one in report["dependencies"] if one.get("vulns")]
        for one in weak:
            for v in one["vulns"]:
                print(
                    f"  {one['name']} {one['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'none'}"
                )
        found += len(weak)
        known = len(report["dependencies"]) - len(unknown)
        print(f"pip-audit {lock}: {known} packages looked up, {len(weak)} with known weaknesses")
    return found


if __name__ == "__main__":
    sys.exit(bool(checkov() + packages()))
