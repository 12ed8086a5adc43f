"""`jobs/benchmark.py loader`: the input pipeline beside its peers, from the decoder to training steps."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lape_ray.bench import feeding, fresh, isolated
from lape_ray.bench.contenders import (
    FFCV,
    OURS,
    PILLOW,
    TORCHVISION,
    Job,
    works,
)
from lape_ray.bench.decoder import decoder_benchmark
from lape_ray.bench.gate import decoder_gate, loader_gate
from lape_ray.bench.inputs import (
    MARKERS,
    ORIGINAL,
    RAW,
    SMALL_JPEG,
    Images,
    Stored,
    make_inputs,
    read_images,
    store,
)
from lape_ray.bench.record import begin, finish, ratio
from lape_ray.bench.settings import Settings
from lape_ray.bench.targets import DEVICE_TARGETS, TARGETS, judge

Note = Callable[[str], None]
Row = dict[str, Any]
AGAIN, PLAIN = f"{OURS}, again", f"{OURS}, no markers"
PEERS = (FFCV, TORCHVISION, PILLOW)


def run(settings: Settings, note: Note) -> Row:
    """The record of a whole run (see `record`).

    Raises:
        WrongPixelsError: our pixels are not Pillow's; nothing was timed.
    """
    _check_device(settings.device)
    record = begin("loader", dataclasses.asdict(settings), device=settings.device)
    with tempfile.TemporaryDirectory(prefix="lape_ray-benchmark-") as folder:
        note("reading images")
        images = read_images(
            settings.images, count=settings.count, split=settings.split, shrink=settings.shrink
        )
        record["images"] = {"origin": images.origin, "count": len(images.files)}
        note("writing files and .betons")
        stored = _store_all(settings, images, Path(folder))
        sections: dict[str, list[Row]] = record["sections"]
        note("comparing pixels with Pillow's")
        sections["gate"] = decoder_gate(images.files, settings.side)
        sections["gate"] += [
            loader_gate(stored[name], settings.side, settings.batch_size)
            for name in stored
            if name.endswith(MARKERS)
        ]
        note("decoders")
        sections["decoder"] = decoder_benchmark(
            images.files, side=settings.side, rounds=settings.rounds, threads=settings.threads
        )
        sections["loader"], sections["scaling"] = loaders(settings, stored, note)
        small = _job(settings, stored[f"{SMALL_JPEG}{MARKERS}"])
        note("memory")
        sections["memory"] = [
            {"name": OURS, **fresh.memory(_job(settings, stored["few"]), settings.memory_epochs)}
        ]
        note("start-up")
        sections["startup"] = [fresh.start_up(name, small, settings.start_rounds) for name in (OURS, FFCV)]
        note("augmentation")
        shape = {"side": settings.side, "batch_size": settings.batch_size}
        sections["augmentation"] = [
            feeding.augmentation(small.stored, **shape, device=settings.device, rounds=settings.rounds)
        ]
        sections["training"] = []
        if settings.training:
            for model in feeding.MODELS:
                config = feeding.training_config(model, small.stored, **shape, threads=settings.threads)
                sections["training"].append(
                    feeding.fed_training(
                        config,
                        device=settings.device,
                        rounds=settings.rounds,
                        round_s=settings.round_s,
                        note=note,
                    )
                )
    record["targets"] = judge(sections, TARGETS + (DEVICE_TARGETS if settings.device != "cpu" else ()))
    finish(record)
    return record


def _check_device(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device} is not there: torch finds no GPU; use --device cpu")


def _store_all(settings: Settings, images: Images, folder: Path) -> dict[str, Stored]:
    """Every form of the images that a contender reads, by name; `few` is for epochs of a second."""
    files = make_inputs(images.files)
    more = max(1, settings.threads // 2)
    batches = {SMALL_JPEG: more * settings.batches, ORIGINAL: -(-more * settings.batches // 2)}
    stored = {}
    for name in (SMALL_JPEG, ORIGINAL):
        if name in settings.inputs:
            for form in (name, f"{name}{MARKERS}"):
                samples = batches[name] * settings.batch_size
                stored[form] = store(form, files[form], folder, samples=samples)
    if RAW in settings.inputs:
        samples = more * settings.batches * settings.batch_size
        stored[RAW] = store(RAW, files[SMALL_JPEG], folder, samples=samples, raw=True)
    few = files[f"{SMALL_JPEG}{MARKERS}"]
    stored["few"] = store("few", few, folder, samples=3 * settings.batch_size)
    return stored


def _job(settings: Settings, stored: Stored) -> Job:
    return Job(stored, settings.side, settings.batch_size, settings.threads, settings.device)


@dataclass(frozen=True)
class Entry:
    """One row of the loaders: what it is called, who runs, on what."""

    label: str
    input: str
    contender: str
    job: Job

    @property
    def key(self) -> str:
        return f"{self.label} / {self.input} / {self.job.threads}"


def entries(settings: Settings, stored: dict[str, Stored]) -> list[Entry]:
    """All contenders on all inputs, and ours with other numbers of threads.

    Ours reads what a writer of ours makes: JPEGs with restart markers. Peers, which gain nothing from markers, read
    the same images without; so does ours in a row of its own.
    """
    found = []
    for name in settings.inputs:
        plain = _job(settings, stored[name])
        ours = _job(settings, stored.get(f"{name}{MARKERS}", stored[name]))
        found += [Entry(OURS, name, OURS, ours), Entry(AGAIN, name, OURS, ours)]
        found += [Entry(PLAIN, name, OURS, plain)] if ours != plain else []
        found += [Entry(peer, name, peer, plain) for peer in PEERS if peer == FFCV or name != RAW]
        if name == SMALL_JPEG:
            found += [
                Entry(OURS, name, OURS, dataclasses.replace(ours, threads=threads))
                for threads in sorted({1, 2} - {settings.threads})
            ]
    return found


def loaders(settings: Settings, stored: dict[str, Stored], note: Note) -> tuple[list[Row], list[Row]]:
    """Rows of all contenders on all inputs, and rows of ours by number of threads."""
    listed = entries(settings, stored)
    groups: dict[str, tuple[Callable[..., isolated.Works], Any]] = {}
    for contender in (OURS, *PEERS):
        jobs = {entry.key: (contender, entry.job) for entry in listed if entry.contender == contender}
        groups[contender] = (works, jobs)
    results = isolated.rounds_of(groups, settings.rounds, lambda text: note(f"loaders: {text}"))
    rows, by_threads = [], []
    firsts: dict[str, Row] = {}
    for entry in listed:
        samples = results[entry.key]
        row: Row = {"name": entry.label, "input": entry.input, "threads": entry.job.threads}
        if isinstance(samples, str):
            if entry.contender == OURS:
                raise RuntimeError(f"{entry.key}: {samples}")
            rows.append(row | {"missing": samples})
            continue
        row |= {"images": samples[0].images, **isolated.measured(samples)}
        if entry.label == OURS and entry.input == SMALL_JPEG:
            by_threads.append(row)
        if entry.job.threads == settings.threads:
            first = firsts.setdefault(entry.input, row)
            row["cpu_over_ours"] = ratio(row["cpu_ms"], first["cpu_ms"])
            row["ours_over_images_per_second"] = ratio(first["images_per_second"], row["images_per_second"])
            rows.append(row)
    by_threads.sort(key=lambda row: int(row["threads"]))
    return rows, [
        {
            "name": OURS,
            "threads": row["threads"],
            "images_per_second": row["images_per_second"],
            "over_one": ratio(row["images_per_second"], by_threads[0]["images_per_second"]),
        }
        for row in by_threads
    ]
