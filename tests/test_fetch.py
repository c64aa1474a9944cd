"""Downloads and archives: whole, as their owners made them, or not at all."""

import hashlib
import http.server
import io
import os
import shutil
import stat
import tarfile
import threading
import zipfile
from contextlib import redirect_stderr
from dataclasses import replace

import pytest
from helpers import Terminal, write_csv

from data import load_dataset
from sounds import paper
from sounds.fetch import Source, download, locate, unpack
from support.command import UserError


@pytest.fixture
def web():
    """A server of this machine: /whole sends 3,000 bytes, /cut says so and sends fewer, /unknown
    does not say."""
    content = bytes(range(250)) * 12

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/absent":
                return self.send_error(404, "Gone for good")
            self.send_response(200)
            if self.path != "/unknown":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:2000] if self.path == "/cut" else content)

        def log_message(self, *_):
            """Keeps the tests' output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", content
        server.shutdown()


# ---------------------------------------------------------------------------------------- downloads


@pytest.mark.parametrize("checksum", [None, "md5", "sha256"])
@pytest.mark.parametrize("name", ["whole", "unknown"])
def test_a_download_is_kept_if_its_checksum_is_right(web, tmp_path, name, checksum, capsys):
    address, content = web
    right = checksum and f"{checksum}:{hashlib.new(checksum, content).hexdigest()}"
    source = Source("Sounds", "a", "b", f"{address}/{name}", checksum=right)
    download(source, tmp_path / "file.zip", "by hand")
    assert (tmp_path / "file.zip").read_bytes() == content
    assert capsys.readouterr().err == ""  # no bar where there is no terminal


@pytest.mark.parametrize(
    ("name", "checksum", "reason"),
    [
        ("cut", "md5:" + "0" * 32, "its MD5 is "),
        ("absent", None, "Gone for good"),
        ("whole", "md5:" + "0" * 32, "its MD5 is {md5}, not " + "0" * 32),
        ("whole", "sha256:" + "f" * 64, "its SHA256 is "),
    ],
)
def test_a_download_that_is_not_right_is_not_kept(web, tmp_path, name, checksum, reason):
    address, content = web
    reason = reason.replace("{md5}", hashlib.md5(content).hexdigest())
    source = Source("Sounds", "a", "b", f"{address}/{name}", checksum=checksum)
    with pytest.raises(UserError) as error:
        locate(source, None, tmp_path)
    message = str(error.value)
    assert message.startswith(f"cannot download {address}/{name} (")
    assert "): download it by hand and give" in message
    assert reason in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["Sounds.lock"]


def test_a_download_shows_its_progress(web, tmp_path):
    with redirect_stderr(Terminal()) as shown:
        download(Source("Sounds", "a", "b", f"{web[0]}/whole"), tmp_path / "file.zip", "by hand")
    assert "Sounds: 100%" in shown.getvalue() and "3.00k/3.00k" in shown.getvalue()


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "ESC50", replace(paper.ESC50, url="http://127.0.0.1:9/master.zip"))
    with pytest.raises(UserError, match=r"cannot download .* by hand .* --data-dir"):
        load_dataset("esc50", None, tmp_path)
    assert not list(tmp_path.glob("*.archive")) and not (tmp_path / "ESC-50").exists()


# ----------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("name", ["/out.txt", "../out.txt", "inside/../../out.txt", "link"])
def test_members_of_a_zip_stay_in_the_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as zipped:
        member = zipfile.ZipInfo(name)
        if name == "link":
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(member, "../a")
    (tmp_path / "a").touch()
    unpack(tmp_path / "evil.zip", tmp_path / "deep" / "target")
    (file,) = [path for path in (tmp_path / "deep" / "target").rglob("*") if not path.is_dir()]
    assert file.read_text() == "../a" and not file.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "deep", "evil.zip"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../outside.txt", tarfile.REGTYPE),
        ("inside/../../outside.txt", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("hard", tarfile.LNKTYPE),
        ("device", tarfile.CHRTYPE),
        ("pipe", tarfile.FIFOTYPE),
    ],
)
def test_tar_members_that_are_refused(tmp_path, name, kind):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        fine = tarfile.TarInfo("fine.txt")
        fine.size = 4
        tar.addfile(fine, io.BytesIO(b"fine"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "../outside.txt"
        tar.addfile(member)
    with pytest.raises(UserError, match="is not a whole zip or tar archive"):
        unpack(tmp_path / "evil.tar.gz", tmp_path / "deep" / "target")
    assert not list((tmp_path / "deep").iterdir()) and not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_ordinary_members_are_unpacked(tmp_path, kind):
    """Folders, files with and without a mode of Unix, and no leftovers of a killed run."""
    (tmp_path / ".target.unfinished").mkdir()
    (tmp_path / ".target.unfinished" / "stale.txt").touch()
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "archive", "w") as zipped:
            zipped.writestr("folder/", "")
            for name, mode in (("folder/one.txt", 0), ("folder/two.txt", stat.S_IFREG | 0o600)):
                member = zipfile.ZipInfo(name)
                member.external_attr = mode << 16
                zipped.writestr(member, name)
    else:
        with tarfile.open(tmp_path / "archive", "w:gz") as tar:
            for name in ("folder", "folder/one.txt", "folder/two.txt"):
                member = tarfile.TarInfo(name)
                member.type, member.mode = (
                    (tarfile.DIRTYPE, 0o777) if name == "folder" else (tarfile.REGTYPE, 0o6777)
                )
                member.size = 0 if name == "folder" else len(name)
                tar.addfile(member, io.BytesIO(name.encode()))
    unpack(tmp_path / "archive", tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").rglob("*")) == [
        "folder",
        "one.txt",
        "two.txt",
    ]
    assert (tmp_path / "target/folder/two.txt").read_text() == "folder/two.txt"
    assert (
        not (tmp_path / "target/folder/one.txt").stat().st_mode & 0o6022
    )  # nobody else's file to write or run as
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_archive_says_why(tmp_path):
    (tmp_path / "a.zip").write_text("not found, said the server")
    with pytest.raises(UserError) as error:
        unpack(tmp_path / "a.zip", tmp_path / "target")
    assert str(error.value) == (
        f"{tmp_path}/a.zip is not a whole zip or tar archive: download it again"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_unpacking_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch, error):
    with zipfile.ZipFile(tmp_path / "archive", "w") as zipped:
        zipped.writestr("one.txt", "one")
        zipped.writestr("two.txt", "two")

    def interrupted(*_):
        raise error

    for owner, name in ((zipfile.ZipFile, "extractall"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(type(error)):
                unpack(tmp_path / "archive", tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["archive"]


# -------------------------------------------------------------------- where datasets are looked for


def test_where_a_dataset_is_looked_for(tmp_path, web):
    """In the folder, one folder below, in an archive; what is missing is said with the way to get
    it."""
    source = Source("Sounds", "meta/list.csv", "meta/list.csv and audio/", by_hand="ask for it")
    root = write_csv(tmp_path / "outer" / "release-1" / "meta" / "list.csv", "a").parents[1]
    assert (
        locate(source, root, tmp_path / "cache")
        == locate(source, root.parent, tmp_path / "cache")
        == root
    )
    with pytest.raises(
        UserError, match=r"outer/release-1/meta does not hold meta/list\.csv: ask for it and give"
    ):
        locate(source, root / "meta", tmp_path / "cache")
    with pytest.raises(
        UserError,
        match=r"Sounds cannot be downloaded: ask for it and give the archive or the unpacked",
    ):
        locate(source, None, tmp_path / "cache")
    with pytest.raises(
        UserError,
        match=r"absent: no such folder or archive; it should hold meta/list\.csv and audio/$",
    ):
        locate(source, tmp_path / "absent", tmp_path / "cache")
    shutil.make_archive(str(tmp_path / "sounds"), "zip", tmp_path / "outer")
    first = locate(source, tmp_path / "sounds.zip", tmp_path / "cache")
    assert first.name == "release-1" and (first / "meta/list.csv").is_file()
    os.utime(tmp_path / "sounds.zip", ns=(0, 0))  # another archive of that name
    assert locate(source, tmp_path / "sounds.zip", tmp_path / "cache") != first
    shutil.copytree(root, tmp_path / "cache" / "Sounds")  # put there by hand
    assert locate(source, None, tmp_path / "cache") == tmp_path / "cache" / "Sounds"
    with pytest.raises(
        UserError,
        match=r"cannot download .* \(HTTP Error 404: Gone for good\): download it by hand and give",
    ):
        locate(Source("More", "a", "b", url=f"{web[0]}/absent"), None, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("More*[!k]"))  # but the lock


def test_only_ones_own_downloads_are_removed(tmp_path):
    """One of another run stays, which holds another lock; one of a killed run goes, and one that
    cannot be unpacked."""
    write_csv(tmp_path / "release" / "meta" / "list.csv", "a")
    archive = shutil.make_archive(str(tmp_path / "sounds"), "zip", tmp_path / "release")
    cache, source = (
        tmp_path / "cache",
        Source("Sounds", "meta/list.csv", "meta/list.csv", url=f"file://{archive}"),
    )
    cache.mkdir()
    downloads = [cache / "Sounds.archive", cache / "More.archive"]
    for file in downloads:
        file.touch()
    locate(source, tmp_path / "sounds.zip", cache)
    assert all(file.exists() for file in downloads)
    assert locate(source, None, cache) == cache / "Sounds"
    assert [file.exists() for file in downloads] == [0, 1]
    (tmp_path / "sounds.zip").write_bytes(b"not found, said the server")
    shutil.rmtree(cache / "Sounds")
    with pytest.raises(UserError, match="is not a whole zip or tar archive"):
        locate(source, None, cache)
    assert not downloads[0].exists()
