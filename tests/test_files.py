"""Files that are whole or not there, and where they are kept."""

import csv
import errno
import io
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from filelock import FileLock, Timeout

from support.files import csv_of, default_cache_dir, locked, table_of, whole_file, whole_folder


def test_where_downloads_and_features_are_kept():
    assert default_cache_dir().name == "ast-petl"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    with whole_file(path) as temporary:
        assert (
            temporary.parent == path.parent and temporary.name.startswith(".") and temporary != path
        )
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half of the sec")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and [file.name for file in path.parent.iterdir()] == [
        "result.json"
    ]
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other  # two processes at once
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_outlives_a_kill_at_any_moment(tmp_path, renames):
    """The earlier folder or the new one is there at the latest when the next one is begun."""
    path = tmp_path / "export"
    path.mkdir()
    (path / "first").touch()
    process = os.fork()
    if process == 0:
        replace = os.replace
        done = []

        def replace_or_die(*names):
            if len(done) == renames:
                os._exit(9)
            done.append(names)
            replace(*names)

        os.replace = replace_or_die
        shutil.rmtree = lambda *_, **options: len(done) < 2 or os._exit(9)
        with whole_folder(path) as folder:
            (folder / "second").touch()
        os._exit(0)
    assert os.waitpid(process, 0)[1] >> 8 == 9
    with pytest.raises(KeyboardInterrupt), whole_folder(path):
        assert [file.name for file in path.iterdir()] == ["second" if renames == 2 else "first"]
        raise KeyboardInterrupt
    assert [folder.name for folder in tmp_path.iterdir()] == ["export"]


def test_who_waits_for_another_run_says_so(tmp_path, capsys):
    """After two seconds; a lock that is free is taken without a word."""
    path, held = tmp_path / "features.npy", Event()

    def another():
        with FileLock(f"{path}.lock"):
            held.set()
            time.sleep(2.5)

    with locked(path):
        assert not capsys.readouterr().err
    with ThreadPoolExecutor() as pool:
        pool.submit(another)
        held.wait()
        with locked(path):
            assert capsys.readouterr().err == f"waiting for another run, which makes {path}\n"
            with pytest.raises(Timeout):
                pool.submit(FileLock(f"{path}.lock").acquire, timeout=0).result()


def test_only_files_are_replaced(tmp_path):
    """Root could put a file in the place of a device."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FileExistsError, match="is there and no file"), whole_file(path):
            pass


def test_a_full_disk_names_the_file(tmp_path):
    """The system does not say where it was full."""
    with pytest.raises(OSError) as error, whole_file(tmp_path / "b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "b") and not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError) as error, whole_file(tmp_path / "b"):
        (tmp_path / "c").read_bytes()
    assert str(error.value.filename) == str(tmp_path / "c")


def test_any_name_comes_back_from_a_table():
    names = ["a, b", 'a "b"', "a\nb", "a\rb", "a\r", "\r\n", "", "a"]
    text = csv_of([["left", "right"], *([name, "b"] for name in names)])
    rows = csv.reader(io.StringIO(text, newline=""))
    assert list(rows) == [["left", "right"], *([name, "b"] for name in names)]


def test_a_table_is_plain_lines():
    assert (
        table_of(["path", "label"], [{"path": "a, b.wav", "label": "dog"}])
        == 'path,label\n"a, b.wav",dog\n'
    )
