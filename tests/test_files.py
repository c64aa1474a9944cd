"""Files that are whole or not there, and where they are kept."""

import os

import pytest

from support.files import default_cache_dir, table_of, whole_file


def test_where_downloads_and_features_are_kept():
    assert default_cache_dir().name == "ast-petl"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    with whole_file(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.startswith(".") and temporary != path
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half of the sec")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and [file.name for file in path.parent.iterdir()] == ["result.json"]
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other  # two processes at once
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"


def test_only_files_are_replaced(tmp_path):
    """Root could put a file in the place of a device."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FileExistsError, match="is there and no file"), whole_file(path):
            pass


def test_a_table_is_plain_lines():
    assert table_of(["path", "label"], [{"path": "a, b.wav", "label": "dog"}]) == 'path,label\n"a, b.wav",dog\n'
