"""Read and write a .beton, or a set of shards, on S3: its manifest, its copy on this machine, its upload."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lape_ray import storage
from lape_ray.config import DataConfig
from lape_ray.data.beton.format import set_files, set_names
from lape_ray.data.beton.manifest import Manifest, manifest_path
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


def local_split(path: str) -> str:
    """Return `path` itself, or the copy of the .beton at an s3:// address, fetched now if this machine has none.

    Its size and sha256 are those of the manifest. See `storage.stage` for what is raised.
    """
    if not storage.is_remote(path):
        return path
    place, _, name = path.rpartition("/")
    objects = _objects(path)
    sha256 = {file.address: manifest.sha256 for file, _, manifest in objects}
    wanted = [item for file, manifest, _ in objects for item in (file, manifest)]
    return str(storage.stage(wanted, below=place, sha256=sha256) / name)


def stage_data(data: DataConfig) -> None:
    """Fetch the copies of both splits to this machine, before anyone waits for batches."""
    for path in (data.train, data.val):
        local_split(path)


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
