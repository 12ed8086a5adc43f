"""Images as .beton files, FFCV's file format, each with a manifest.

format    the layout, and how one file or a set of shards is read
blocks    checksums of a file's blocks, by which its parts are verified
manifest  the description of a file: its contents and how it was made
encode    one image as it is stored
journal   a file that outlives the process which writes it
writer    `write_beton`: a source to a file or a set of shards
convert   the steps behind jobs/write_beton.py
repeated  `repeated_images`: images that a file holds more than once
check     `check_beton`: whether a file is what its manifest says
"""

from lape_ray.data.beton.check import check_beton
from lape_ray.data.beton.format import Contents, read_contents, set_files, shard_path
from lape_ray.data.beton.manifest import Manifest, manifest_path
from lape_ray.data.beton.writer import write_beton

__all__ = [
    "Contents",
    "Manifest",
    "check_beton",
    "manifest_path",
    "read_contents",
    "set_files",
    "shard_path",
    "write_beton",
]
