"""The storage of runs, data and exports: a folder or an s3:// address, through one small set of functions.

    address    addresses and their parts
    s3         the connection: credentials, retries, and errors that say the fix
    objects    listing, small texts and deletion
    transfer   large files, in parallel parts, with checksums
    hub        checkpoints on the Hugging Face hub, read and written
    copies     copies of S3 objects on this machine, made once and used by all its processes
    files      reading, writing, listing and deleting, in folders and on S3
    records    small JSON files that are whole, and readers that name the file and the way out
    publish    folders that appear whole
    lease      the right to write into a folder, which one process has at a time
    csv_rows   tables whose cells no spreadsheet runs as formulas

Credentials, region and endpoint of S3 come from the usual environment variables and profiles (AWS_*).
"""

from lape_ray.storage.address import absolute, absolute_store, home, is_remote, join, safe_relative
from lape_ray.storage.copies import cache, local, opened, stage
from lape_ray.storage.csv_rows import write_rows
from lape_ray.storage.files import (
    Stored,
    check_writable,
    delete_file,
    delete_folder,
    empty_folder,
    exists,
    files_of_folders,
    modified,
    names,
    read_text,
    sweep_temporaries,
    write_text,
    written_folder,
    written_path,
)
from lape_ray.storage.hub import check_push, push
from lape_ray.storage.lease import (
    LEASE,
    LEASE_FILES,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    check_lease,
    leased,
)
from lape_ray.storage.objects import Object, listing
from lape_ray.storage.publish import folders, free_bytes, publish, retry, staging
from lape_ray.storage.records import read_record, write_record
from lape_ray.storage.transfer import upload, upload_folder

__all__ = [
    "LEASE",
    "LEASE_FILES",
    "Lease",
    "LeaseHeldError",
    "LeaseLostError",
    "Object",
    "Stored",
    "absolute",
    "absolute_store",
    "cache",
    "check_lease",
    "check_push",
    "check_writable",
    "delete_file",
    "delete_folder",
    "empty_folder",
    "exists",
    "files_of_folders",
    "folders",
    "free_bytes",
    "home",
    "is_remote",
    "join",
    "leased",
    "listing",
    "local",
    "modified",
    "names",
    "opened",
    "publish",
    "push",
    "read_record",
    "read_text",
    "retry",
    "safe_relative",
    "stage",
    "staging",
    "sweep_temporaries",
    "upload",
    "upload_folder",
    "write_record",
    "write_rows",
    "write_text",
    "written_folder",
    "written_path",
]
