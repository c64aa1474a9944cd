"""Published datasets: found, downloaded, unpacked."""

import hashlib
import http.client
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.command import UserError, printable
from support.files import locked, whole_folder
from support.progress import Bar


@dataclass(frozen=True)
class Source:
    """What a published dataset looks like on disk, and where it comes from."""

    folder: str  # its name under the cache folder
    marker: str  # a file by which its root is recognised
    layout: str  # what else the root holds, for messages
    url: str | None = None  # None: its owners hand it out on request
    by_hand: str = "download it by hand"
    checksum: str | None = None  # of the archive, "md5:..." or "sha256:..."


def locate(source: Source, data_dir: Path | None, cache_dir: Path) -> Path:
    """The root of a dataset. It lies in `data_dir`, which is a folder or an archive.

    Without `data_dir` it lies under `cache_dir`, and is downloaded if it is not there.
    """
    by_hand = (
        f"{source.by_hand} and give the archive or the unpacked folder as --data-dir "
        f"(it holds {source.layout})"
    )
    if data_dir is None:
        folder = cache_dir / source.folder
        if source.url is None and not folder.exists():
            raise UserError(f"{source.folder} cannot be downloaded: {by_hand}")
        make_once(folder, lambda: fetch(source, folder, by_hand))
    elif data_dir.is_file():  # every archive is unpacked into a folder of its own
        info = data_dir.stat()
        folder = cache_dir / f"{source.folder}-{info.st_size}-{info.st_mtime_ns}"
        make_once(folder, lambda: unpack(data_dir, folder))
    else:
        folder = data_dir
        if not folder.is_dir():
            raise UserError(
                f"--data-dir {data_dir}: no such folder or archive; it should hold {source.layout}"
            )
    # The dataset may lie one folder deeper, in one that the archive has added.
    found = sorted(folder.glob(source.marker)) + sorted(folder.glob(f"*/{source.marker}"))
    if not found:
        raise UserError(f"{folder} does not hold {source.marker}: {by_hand}")
    return found[0].parents[len(Path(source.marker).parts) - 1]


def make_once(folder: Path, make: Callable[[], None]) -> None:
    """Call `make` unless the folder is there. If two runs start together, one of them makes it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not folder.exists():
                make()


def fetch(source: Source, folder: Path, by_hand: str) -> None:
    """Download a dataset and unpack it into the new folder `folder`. The caller holds its lock.

    `by_hand` ends the error message. It says how to do without.
    """
    archive = folder.with_name(f"{source.folder}.archive")  # one of a killed run is overwritten
    try:
        download(source, archive, by_hand)
        unpack(archive, folder)
    finally:
        archive.unlink(missing_ok=True)


def download(source: Source, archive: Path, by_hand: str) -> None:
    """Download the archive of a dataset, with a progress bar."""
    algorithm, _, expected = (source.checksum or "sha256:").partition(":")
    digest = hashlib.new(algorithm)
    try:
        with (
            urllib.request.urlopen(source.url, timeout=30) as response,
            open(archive, "wb") as file,
        ):
            size = int(response.headers.get("Content-Length") or 0)
            with Bar(total=size or None, desc=source.folder, unit="B", unit_scale=True) as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
        if expected and digest.hexdigest() != expected:
            raise OSError(f"its {algorithm.upper()} is {digest.hexdigest()}, not {expected}")
    except (OSError, http.client.HTTPException) as error:  # urllib raises OSError, too
        raise UserError(f"cannot download {source.url} ({error}): {by_hand}") from None


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or a tar, compressed or not, into the new folder `folder`, whole or not at all.

    Nothing lands outside of the folder, and no device or link to elsewhere in it.
    """
    print(f"unpacking {printable(archive)}", flush=True)
    try:
        with whole_folder(folder) as temporary:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as zipped:
                    zipped.extractall(temporary)
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(temporary, filter="data")
    except Exception as error:  # a damaged archive raises one of a dozen kinds
        if getattr(error, "errno", None) is not None:
            raise  # of the disk
        message = f"{archive} is not a whole zip or tar archive: download it again"
        raise UserError(message) from None
