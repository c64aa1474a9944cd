"""Published datasets: found, downloaded, unpacked."""

import hashlib
import http.client
import lzma
import os
import stat
import struct
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.command import UserError
from support.files import locked, whole_file, whole_folder
from support.progress import Bar

DAMAGE = (  # what zipfile and tarfile raise for a damaged, an encrypted or an unknown archive
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    RuntimeError,
    ValueError,
    struct.error,
)


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
        identity = f"{data_dir.resolve()} {info.st_size} {info.st_mtime_ns}"
        digest = hashlib.sha256(os.fsencode(identity)).hexdigest()
        folder = cache_dir / f"{source.folder}-{digest[:8]}"
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
    """Download a dataset and unpack it into the new folder `folder`. The caller holds its lock."""
    archive = folder.with_name(f"{source.folder}.archive")
    for left in folder.parent.glob(f".{archive.name}.*.tmp"):  # by a download that was killed
        left.unlink()
    try:
        unpack(download(source.url, archive, by_hand, source.checksum), folder)
    finally:
        archive.unlink(missing_ok=True)


def download(url: str, target: Path, by_hand: str, checksum: str | None = None) -> Path:
    """Fetch `url` into the file `target`, with a progress bar.

    `by_hand` ends the error message. It says how to do without. `checksum` is "md5:..." or
    "sha256:..." in hexadecimal digits. A file with another one is not kept.
    """
    algorithm, _, expected = (checksum or "sha256:").partition(":")
    digest = hashlib.new(algorithm)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, whole_file(target) as temporary:
            size = int(response.headers.get("Content-Length") or 0)
            bar = Bar(total=size or None, desc=target.name, unit="B", unit_scale=True)
            with open(temporary, "wb") as file, bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
            arrived = temporary.stat().st_size
            if size and arrived != size:
                raise OSError(f"the connection ended after {arrived} of {size} bytes")
            if expected and digest.hexdigest() != expected:
                raise OSError(f"its {algorithm.upper()} is {digest.hexdigest()}, not {expected}")
    except (OSError, http.client.HTTPException) as error:  # urllib raises OSError, too
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer as well
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot download {url} ({reason}): {by_hand}") from None
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or a tar, compressed or not, into the new folder `folder`, whole or not at all.

    UserError for a damaged archive, and for a link, a device and a path that leaves the folder.
    """
    try:
        with whole_folder(folder) as temporary:
            if zipfile.is_zipfile(archive):
                unpack_zip(archive, temporary)
            else:
                unpack_tar(archive, temporary)
    except (*DAMAGE, OSError) as error:
        if isinstance(error, UserError) or getattr(error, "errno", None) is not None:
            raise  # an error of the disk says nothing of the archive
        reason = str(error).split("\n")[0].rstrip(":") or "it ends too early"
        raise UserError(
            f"{archive} is not a whole zip or tar archive ({reason}): download it again"
        ) from None


def unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as zipped:
        for member in Bar(zipped.infolist(), f"unpacking {archive.name}", unit="file"):
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 in an archive not made on Unix
            require_ordinary(
                archive, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR), folder
            )
            zipped.extract(member, folder)


def unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in Bar(tar, f"unpacking {archive.name}", unit="file"):
            require_ordinary(archive, member.name, member.isreg() or member.isdir(), folder)
            tar.extract(member, folder, filter="data")  # without owners and odd permissions
        if tar.fileobj.tell() == tar.offset:  # no block of zeros: members may be missing
            raise EOFError
        while tar.fileobj.read(1 << 20):  # up to the checksum of the compression
            pass


def require_ordinary(archive: Path, name: str, is_ordinary: bool, folder: Path) -> None:
    """UserError for a member of an archive that is no file, or would land outside the folder."""
    if not is_ordinary or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{archive}: refusing {name!r}, a link, a device or a path that leaves the folder"
        )
