"""One node of a run whose data stream: `stream_nodes.py RANK SIZE PORT CACHE CONFIG_FIELDS`.

Prints one line of JSON: the losses of all steps, and which copies are whole when the training has ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from seeds import Recorder

from lape_ray import storage
from lape_ray.cluster.group import Alone
from lape_ray.cluster.worker import _data_at_hand
from lape_ray.config import replace_fields
from lape_ray.recipes import recipe
from lape_ray.training.loop import train


class Nodes(Alone):
    """The workers of a run that torch.distributed alone connects."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


def main(rank: int, size: int, port: str, cache: str, fields: dict[str, Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LAPE_RAY_CACHE=cache)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.set_num_threads(1)
    config = replace_fields(recipe("smoke"), {**fields, "run.num_workers": size})
    reporter, device = Recorder(), torch.device("cpu")
    with _data_at_hand(config, Nodes(), device):
        train(config, device=device, reporter=reporter)
        whole = 0
        deadline = time.monotonic() + 120
        while config.data.train.startswith("s3://") and whole < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            whole = len(list(storage.cache().glob("*/.complete")))
        dist.barrier()  # others may still ask this node for blocks
    print(json.dumps({"losses": reporter.losses, "whole": whole}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        sys.argv[4],
        json.loads(Path(sys.argv[5]).read_text()),
    )
