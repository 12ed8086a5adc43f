"""Where runs, data and exports are kept: a folder or an s3:// address, through one small set of functions.

    address    what an address is, and the parts of one
    s3         the connection: who we are, what is tried again, and errors that say the fix
    objects    listing, small texts and deletion
    transfer   large files, in parallel parts, with checksums
    copies     copies of S3 objects on this machine, made once and used by all its processes
    files      the same few verbs for folders and for S3
    publish    folders that appear whole

Credentials, region and endpoint of S3 come from the usual environment variables and profiles (AWS_*).
"""

from lape_ray.storage.address import absolute, home, is_remote, join, safe_relative
from lape_ray.storage.copies import cache, local, stage
from lape_ray.storage.files import (
    check_writable,
    delete_folder,
    exists,
    read_text,
    write_text,
    written_folder,
    written_path,
)
from lape_ray.storage.objects import Object, listing
from lape_ray.storage.publish import folders, free_bytes, patiently, publish, staging
from lape_ray.storage.transfer import upload, upload_folder

__all__ = [
    "Object",
    "absolute",
    "cache",
    "check_writable",
    "delete_folder",
    "exists",
    "folders",
    "free_bytes",
    "home",
    "is_remote",
    "join",
    "listing",
    "local",
    "patiently",
    "publish",
    "read_text",
    "safe_relative",
    "stage",
    "staging",
    "upload",
    "upload_folder",
    "write_text",
    "written_folder",
    "written_path",
]
