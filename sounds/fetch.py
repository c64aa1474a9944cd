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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.command import UserError
from support.files import locked, whole_file, whole_folder
from support.progress import Bar

# What zipfile and tarfile raise for an archive that is damaged, encrypted (RuntimeError) or of a kind they do not know.
DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, RuntimeError, ValueError, struct.error
)  # fmt: skip


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
    """The root of a dataset: in `data_dir` (a folder or an archive), else under `cache_dir`, downloaded when absent."""
    by_hand = f"{source.by_hand} and give the archive or the unpacked folder as --data-dir (it holds {source.layout})"
    folder = data_dir
    if data_dir is None or data_dir.is_file():
        folder = cache_dir / source.folder
        if data_dir is not None:  # another archive is unpacked into another folder
            info = data_dir.stat()
            identity = f"{data_dir.resolve()} {info.st_size} {info.st_mtime_ns}"
            folder = cache_dir / f"{source.folder}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:8]}"
        elif source.url is None and not folder.exists():
            raise UserError(f"{source.folder} cannot be downloaded: {by_hand}")
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(folder):  # two runs that start together download once
            if not folder.exists():
                if data_dir is None:
                    fetch(source, folder, by_hand)
                else:
                    unpack(data_dir, folder)
    elif not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder or archive; it should hold {source.layout}")
    # An archive may add a folder of its own, and the user may point at the folder that holds the dataset.
    found = sorted(folder.glob(source.marker)) + sorted(folder.glob(f"*/{source.marker}"))
    if not found:
        raise UserError(f"{folder} does not hold {source.marker}: {by_hand}")
    return found[0].parents[len(Path(source.marker).parts) - 1]


def fetch(source: Source, folder: Path, by_hand: str) -> None:
    """Download a dataset and unpack it into the new folder `folder`, whose lock the caller holds; only that stays."""
    archive = folder.with_name(f"{source.folder}.archive")
    for left in folder.parent.glob(f".{archive.name}.*.tmp"):  # by a download that was killed
        left.unlink()
    try:
        unpack(download(source.url, archive, by_hand, source.checksum), folder)
    finally:
        archive.unlink(missing_ok=True)


def download(url: str, target: Path, by_hand: str, checksum: str | None = None) -> Path:
    """Fetch `url` into the file `target`, with a progress bar. `by_hand` ends the error message: the way without it.

    `checksum` is "md5:..." or "sha256:...", in hexadecimal digits; a file with another one is not kept.
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
            if size and temporary.stat().st_size != size:
                raise OSError(f"the connection ended after {temporary.stat().st_size} of {size} bytes")
            if expected and digest.hexdigest() != expected:
                raise OSError(f"its {algorithm.upper()} is {digest.hexdigest()}, not {expected}")
    except (OSError, http.client.HTTPException) as error:  # OSError is what urllib raises, too
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer as well
        raise UserError(f"cannot download {url} ({getattr(error, 'reason', error)}): {by_hand}") from None
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or a tar (compressed or not) into the new folder `folder`, whole or not at all.

    Raises UserError for a damaged archive and for members that would land outside the folder, links and devices.
    """
    progress = partial(Bar, desc=f"unpacking {archive.name}", unit="file")
    try:
        with whole_folder(folder) as temporary:

            def refuse(name, ordinary):
                if not ordinary or not (temporary / name).resolve().is_relative_to(temporary.resolve()):
                    raise UserError(f"{archive}: refusing {name!r}, a link, a device or a path that leaves the folder")

            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as zipped:
                    for member in progress(zipped.infolist()):
                        kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was not made on Unix
                        refuse(member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                        zipped.extract(member, temporary)
            else:
                with tarfile.open(archive) as tar:
                    for member in progress(tar):
                        refuse(member.name, member.isreg() or member.isdir())
                        tar.extract(member, temporary, filter="data")  # drops owners and odd permissions as well
                    if tar.fileobj.tell() == tar.offset:  # no block of zeros: members may be missing
                        raise EOFError
                    while tar.fileobj.read(1 << 20):  # to the checksum of the compression
                        pass
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the archive
            raise
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else "it ends too early"
        raise UserError(f"{archive} is not a whole zip or tar archive ({reason}): download it again") from None
