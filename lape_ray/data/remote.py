"""Read and write a .beton, or a set of shards, on S3: its manifest, its copy on this machine, its upload."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lape_ray import storage
from lape_ray.data.beton.format import set_files, set_names
from lape_ray.data.beton.manifest import Manifest, manifest_path
from lape_ray.storage.copies import Place
from lape_ray.values.program import program


def _objects(address: str) -> list[tuple[storage.Object, storage.Object, Manifest]]:
    """List (file, manifest object, manifest) of each file of the set, all checked by their sizes."""
    place, _, name = address.rpartition("/")
    if not name.endswith(".beton"):
        raise ValueError(
            f"{address} is no .beton; data on S3 is written and read as one: "
            f"{program('write-data')} SOURCE {place}/NAME.beton"
        )
    # Objects of folders below it are left out.
    listed = storage.listing(f"{place}/{Path(name).stem}")
    objects = {item.name: item for item in listed if item.address == f"{place}/{item.name}"}
    files = []
    for file in set_names(name, objects.keys(), place):
        manifest_name = manifest_path(file).name
        if manifest_name not in objects:
            raise FileNotFoundError(
                f"{place}/{manifest_name} is missing; copy it with its .beton, or write both again"
            )
        manifest_address = objects[manifest_name].address
        manifest = Manifest.parse(storage.read_text(manifest_address), manifest_address)
        if objects[file].size != manifest.bytes:
            raise ValueError(
                f"{place}/{file} has {objects[file].size:,} bytes but its manifest says {manifest.bytes:,}; "
                "upload it again"
            )
        files.append((objects[file], objects[manifest_name], manifest))
    return files


def remote_manifest(address: str) -> Manifest:
    """Read the manifest of what lies at the address, if the sizes agree with it; the images are not fetched.

    Raises:
        FileNotFoundError, ValueError: something is missing or of another size.
        OSError: S3 does not answer as it should; says why.
    """
    return Manifest.of_set([manifest for _, _, manifest in _objects(address)], address)


@dataclass(frozen=True)
class RemoteSet:
    """A .beton, or a set of shards, at an s3:// address.

    Attributes:
        files: (file, manifest object, manifest) of each file of the set
        place: of its copy on this machine
    """

    address: str
    files: tuple[tuple[storage.Object, storage.Object, Manifest], ...]
    place: Place

    @classmethod
    def find(cls, address: str) -> RemoteSet:
        """Find what lies at the address; see `remote_manifest` for what is raised."""
        files = _objects(address)
        objects, sha256 = _staged(files)
        return cls(address, tuple(files), Place.of(objects, below=address.rpartition("/")[0], sha256=sha256))

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def can_stream(self) -> bool:
        """Tell whether parts of it can be verified, and so used, before the rest of it is here."""
        return all(manifest.blocks for _, _, manifest in self.files)

    def copied(self) -> str:
        """Return the path of its copy, fetched now if this machine has none."""
        objects, sha256 = _staged(self.files)
        return str(storage.stage(objects, below=self.address.rpartition("/")[0], sha256=sha256) / self.name)


def _staged(
    files: Sequence[tuple[storage.Object, storage.Object, Manifest]],
) -> tuple[list[storage.Object], dict[str, str]]:
    """Return the objects of a set, and the sha256 of those whose manifest says it."""
    objects = [item for file, manifest, _ in files for item in (file, manifest)]
    return objects, {file.address: manifest.sha256 for file, _, manifest in files}


def local_split(path: str, *, arriving: bool = False) -> str:
    """Return `path` itself, or the copy of the .beton at an s3:// address, fetched now if this machine has none.

    Its size and sha256 are those of the manifest. See `storage.stage` for what is raised.

    Args:
        arriving: whether the caller knows how to read a copy that is on its way (`data.streaming`).
    """
    if not storage.is_remote(path):
        return path
    found = RemoteSet.find(path)
    if arriving and not found.place.is_complete() and (folder := found.place.arriving()):
        return str(folder / found.name)
    return found.copied()


@contextlib.contextmanager
def written_beton(path: str) -> Iterator[str]:
    """Give a path to write a .beton, or a set, at.

    For an s3:// address it is uploaded when the block ends without error. What an interrupted writer leaves stays on
    this machine, and the same address finds it again.
    """
    if not storage.is_remote(path):
        yield path
        return
    name = storage.safe_relative(path.rpartition("/")[2], path, "write s3://BUCKET/.../NAME.beton")
    storage.check_writable(path.rpartition("/")[0])
    folder = storage.cache() / "written" / hashlib.sha256(path.encode()).hexdigest()[:16]
    yield str(folder / name)
    files = set_files(folder / name)
    for file in (*files, *map(manifest_path, files)):  # a manifest says that its file exists
        storage.upload(file, f"{path.rpartition('/')[0]}/{file.name}")
    shutil.rmtree(folder)
