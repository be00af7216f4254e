"""Files that somebody else may have put there."""

import json
import os
from pathlib import Path

import pytest

from lora_sweep.system import files
from lora_sweep.system.files import Unsafe


def test_a_regular_file_is_read_and_a_link_to_it_where_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    assert files.read_bytes(tmp_path / "a", 3) == files.read_bytes(tmp_path / "b", 3) == b"abc"
    with pytest.raises(Unsafe, match=r"^is a link$"):
        files.read_bytes(tmp_path / "b", 3, follow=False)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path, said in ((tmp_path / "fifo", "a FIFO"), (tmp_path, "a folder"), (tmp_path / "zero", "a device")):
        with pytest.raises(Unsafe, match=f"^is {said}, no file$"):
            files.read_bytes(path, 10)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "none", 10)


def test_a_file_of_more_bytes_than_its_bound_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(Unsafe, match=r"^is larger than 1,000 bytes$"):
        files.read_bytes(tmp_path / "sparse", 1000)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"{", "is no JSON"),
        (b"", "is no JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[" * 100_000, "is nested too deep"),
        (b'{"a":' * 100_000, "is nested too deep"),
        (b"1" * 100_000, "cannot be read"),
    ],
    ids=["cut", "empty", "encoding", "arrays", "objects", "digits"],
)
def test_json_that_cannot_be_read_is_refused_in_one_clause(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(Unsafe, match=f"^{said}[^\n]*$"):
        files.read_json(tmp_path / "x.json")


def test_a_file_is_written_whole_in_the_place_of_a_link_and_never_through_it(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    for name in ("x.json", "x.json.tmp"):
        (tmp_path / name).symlink_to("precious")
    files.write_whole(tmp_path / "x.json", b"1")
    assert (tmp_path / "precious").read_text() == "mine"
    assert json.loads((tmp_path / "x.json").read_text()) == 1 and not (tmp_path / "x.json").is_symlink()
    assert oct((tmp_path / "x.json").stat().st_mode & 0o777) == oct((tmp_path / "precious").stat().st_mode & 0o777)
    with pytest.raises(Unsafe, match=r"^is a link$"):
        files.append_to(tmp_path / "x.json.tmp")
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "x.json.tmp")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["precious", "x.json", "x.json.tmp"]


def test_of_a_link_the_link_alone_is_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to("../kept")
    assert list(files.links(tmp_path)) == [tmp_path / "folder" / "link"]
    files.remove(tmp_path / "folder" / "link")
    files.remove(tmp_path / "folder")
    files.remove(tmp_path / "none")
    assert [each.name for each in tmp_path.rglob("*")] == ["kept", "file"]
