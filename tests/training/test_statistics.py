"""Running statistics of batch norms through the micro-batches of a step, beside the definition written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lape_ray.training.distributed import World
from lape_ray.training.statistics import RunningStatistics

WORLD = World(0, 1, torch.device("cpu"))


def step(norm: nn.Module, micro_batches: list[Tensor]) -> None:
    statistics = RunningStatistics(norm, WORLD, micro_batches=len(micro_batches), own=len(micro_batches))
    statistics.begin()
    for images in micro_batches:
        norm(images)
        statistics.end_micro_batch()
    statistics.end()


def test_a_step_moves_them_by_the_mean_of_its_micro_batches() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.get_buffer("running_mean"))
    before = norm.get_buffer("running_mean").clone(), norm.get_buffer("running_var").clone()
    micro_batches = [torch.randn(4, 3, 5, 5) + shift for shift in range(3)]
    step(norm, micro_batches)
    channels = [images.transpose(0, 1).flatten(1) for images in micro_batches]
    mean = torch.stack([part.mean(1) for part in channels]).mean(0)
    variance = torch.stack([part.var(1) for part in channels]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.9 * before[0] + 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 * before[1] + 0.1 * variance)
    assert norm.num_batches_tracked == 1


def test_their_order_does_not_matter() -> None:
    micro_batches = [torch.randn(4, 3, 5, 5) + shift for shift in range(3)]
    one, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    step(one, micro_batches)
    step(other, micro_batches[::-1])
    torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_one_micro_batch_is_what_a_batch_norm_does_by_itself() -> None:
    images = torch.randn(4, 3, 5, 5)
    plain, stepped = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    plain(images)
    step(stepped, [images])
    assert all(torch.equal(stepped.state_dict()[name], value) for name, value in plain.state_dict().items())
