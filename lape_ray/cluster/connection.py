"""A connection to Ray, and work spread over its nodes. Training is in `launch`."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
from ray._common.utils import get_ray_address_file
from ray._private.services import canonicalize_bootstrap_address, find_gcs_addresses
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lape_ray.cluster.local import check_answers, free_ports, own_token
from lape_ray.data.processes import Mapper
from lape_ray.values.environment import environment
from lape_ray.values.redaction import redacted

T = TypeVar("T")
R = TypeVar("R")

NAMESPACE = "lape_ray"  # of the names of actors
GONE_S = 20.0  # within which Ray ends what belonged to a driver that was killed
SHARED_BYTES_OF_A_GPU = 64 * 2**20
"""About what NCCL takes of a node's shared memory for each GPU, with its default buffers and some room."""

_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # at which the controller polls workers, and hears of lost ones
    # After which it asks again for how many workers there is room: an elastic run first asks for a lost node's CPUs.
    # Workers have more time to start: this is for their reservation alone.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # After which a worker that does not answer, as its process stands still, counts as lost; Ray's own is ten minutes.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with the patch every printed line appears twice in the job's log
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's page of training runs
    # Workers look for themselves (`supervisor.LeavingNode`); its actor costs a process and logs an error at its start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@contextlib.contextmanager
def connected(*, show_logs: bool = True) -> Iterator[bool]:
    """Connect to the cluster: the connection that exists, the cluster at RAY_ADDRESS, or a local one.

    Yields whether it is a local one that ends with the block.

    A local one gets a token, where no RAY_AUTH_MODE or RAY_AUTH_TOKEN says otherwise.
    Without `show_logs`, what other processes print stays in their logs: a table on a terminal needs the room.

    Raises:
        ValueError: no Ray answers at RAY_ADDRESS.
    """
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    if ray.is_initialized():
        yield False
        return
    with contextlib.ExitStack() as stack:
        address = find_cluster()  # asked once: it looks through the processes of the host
        options: dict[str, Any] = {}
        if address is None:
            if not _has_authentication():
                stack.enter_context(_token_of_its_own())
            stack.enter_context(_known_address())
            options["address"] = "local"
        elif len(find_gcs_addresses()) > 1:
            options["runtime_env"] = {"env_vars": {"RAY_ADDRESS": address}}
        # Ray tells of addresses that this command knows, and of the token, which is its own.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        found = ray.init(log_to_driver=show_logs, logging_level=logging.WARNING, **options)
        if address is None and (dashboard := found.dashboard_url):
            print(f"Ray dashboard: http://{dashboard}", flush=True)
        try:
            yield address is None
        finally:
            ray.shutdown()


def _has_authentication() -> bool:
    """Tell whether the user has settled who may reach a Ray that is started here."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        return not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}.isdisjoint(os.environ)
    return mode.lower() != "token" or ray._raylet.AuthenticationTokenLoader.instance().has_token(True)


def find_cluster() -> str | None:
    """Return the address of the cluster that `ray.init` would connect to; None: it is to start a local one.

    The address is tried, for `ray.init` itself waits minutes for a cluster that is gone. The file where `ray start`
    notes its address outlives a Ray that was killed.

    Raises:
        ValueError: no Ray answers at RAY_ADDRESS, or it has an account.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if "@" in given:  # with or without a scheme; Ray shows addresses, and errors quote parts of them
        raise ValueError(
            f"RAY_ADDRESS=...@{redacted(given.rpartition('@')[2])} has an account, which Ray does not read: leave out "
            "what stands before @; a token is given as RAY_AUTH_TOKEN"
        )
    try:
        address = given if "://" in given else canonicalize_bootstrap_address(None)
        if address is not None:
            check_answers(address)
        return address
    except (OSError, ValueError) as error:  # the latter: it is no address at all
        if given:
            raise ValueError(
                f"no Ray answers at RAY_ADDRESS={redacted(given)} ({error}): start the cluster, correct RAY_ADDRESS, "
                "or unset it for a Ray of the command's own"
            ) from None
        file = get_ray_address_file(None)
        print(f"the Ray that {file} names does not answer ({error}); this command starts its own", flush=True)
        return None


def _known_address() -> contextlib.AbstractContextManager[None]:
    """Let all processes of the Ray that is started in the context know its address, from their environment.

    Helpers of Ray Train look for it there, and else among the processes of the host, where they fail if it has another
    Ray.
    """
    (port,) = free_ports(1)
    address = f"{ray.util.get_node_ip_address()}:{port}"
    return environment({"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": address})


@contextlib.contextmanager
def _token_of_its_own() -> Iterator[None]:
    """Give the Ray that is started in the context a token, which this process and those it starts alone know.

    Ray itself would write one to ~/.ray/auth_token, where every user of the machine may read it.
    """
    try:
        with environment({name: value for name, value in own_token().items() if name not in os.environ}):
            _read_authentication()
            yield
    finally:
        _read_authentication()


def _read_authentication() -> None:
    """Make Ray read its variables of authentication, as it does once by itself when it is imported."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def only_actor(cls: type, name: str, *arguments: Any, **options: Any) -> Any:
    """Make an actor of `cls` that is the only one of its name on the connected cluster, and ends with this driver.

    A driver that was killed leaves its actors to Ray for some seconds; they are waited for.

    Raises:
        ValueError: another driver has an actor of this name.
    """
    deadline = time.monotonic() + GONE_S
    while True:
        try:
            actor = ray.remote(cls).options(name=name, namespace=NAMESPACE, num_cpus=0, **options)
            return actor.remote(*arguments)
        except ValueError as error:
            if "already taken" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise ValueError(
                    f"another driver of this cluster is at work on {name}: wait for it, or choose another --run.name"
                ) from None
            time.sleep(1)


@contextlib.contextmanager
def ray_mapper() -> Iterator[Mapper]:
    """Map over all CPUs of the cluster, one task each; a task whose node is lost runs again elsewhere.

    Functions must be importable on the nodes, and what they read must be readable there. Results travel back to
    the caller: two for each CPU are held at a time, whatever the speed of either side.
    """
    with connected():

        def ordered(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
            remote = ray.remote(num_cpus=1, max_retries=5)(function)
            pending: deque[ray.ObjectRef] = deque()
            try:
                for task in tasks:
                    pending.append(remote.remote(task))
                    if len(pending) > 2 * max(1, int(ray.cluster_resources().get("CPU", 1))):
                        yield ray.get(pending.popleft())
                while pending:
                    yield ray.get(pending.popleft())
            except ray.exceptions.WorkerCrashedError as error:
                raise OSError(
                    "a Ray worker died again and again at the same task, most likely for want of memory"
                ) from error
            finally:
                for reference in pending:
                    ray.cancel(reference, force=False)

        yield ordered


def refuse_little_shared_memory() -> None:
    """Raise a ValueError where a node with GPUs has too little shared memory for what NCCL exchanges within it.

    A container has 64 MB unless it is told otherwise, and NCCL's own error does not say so.
    """
    free = ray.remote(num_cpus=0)(_free_shared_memory)
    nodes = {
        node["NodeID"]: node["Resources"]["GPU"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) > 1
    }
    found = {
        name: free.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=True)).remote()
        for name in nodes
    }
    for name, reference in found.items():
        have, need = ray.get(reference), int(nodes[name]) * SHARED_BYTES_OF_A_GPU
        if have < need:
            raise ValueError(
                f"node {name[:12]} has {have / 2**20:.0f} MB of shared memory left, and its {nodes[name]:g} GPUs need "
                f"{need / 2**20:.0f} MB to exchange gradients: give the container more (docker run --shm-size, or an "
                "emptyDir of medium Memory at /dev/shm)"
            )


def _free_shared_memory() -> int:
    return shutil.disk_usage("/dev/shm").free
