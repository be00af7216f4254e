"""Data files as people have them: each row with its place, none lost without a word."""

import datetime
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from test_prepare import faults_of, of_file, rows, whole, words

from lora_sweep.data import example, source
from lora_sweep.data import load as load_data
from lora_sweep.data.file_rows import Row, Unreadable, of_files
from lora_sweep.system.bounds import bounded


def read(file: Path, content: str) -> list[Row]:
    file.write_text(content, encoding="utf-8")
    return list(of_files([file]))


def talk(answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a", **more}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mine.csv", 'a "half,said'),  # a quote inside a cell is none that opens it
        ("mine.csv", '"a ""quoted"" word",b'),
        ("mine.tsv", "a, b\tc"),
    ],
)
def test_quotes_as_they_should_be_are_no_fault(tmp_path: Path, name: str, line: str) -> None:
    head = "text\tother" if name.endswith(".tsv") else "text,other"
    rows = read(tmp_path / name, f"{head}\n{line}\nc{head[4]}d\n")
    assert [row.broken for row in rows] == ["", ""]


@pytest.mark.parametrize(("name", "comma"), [("mine.csv", ","), ("mine.tsv", "\t")])
@pytest.mark.parametrize("closed", [None, 15])
def test_a_quote_that_is_not_closed_takes_no_row_with_it_in_silence(
    tmp_path: Path, name: str, comma: str, closed: int | None
) -> None:
    lines = [f"q {number}{comma}a {number}" for number in range(20)]
    lines[9] = f'q 9{comma}"a 9'
    if closed is not None:
        lines[closed] = f'"q {closed}"{comma}"a {closed}"'
    rows = read(tmp_path / name, "\n".join([f"prompt{comma}completion", *lines]) + "\n")
    lost = [row.where for row in rows if row.broken]
    last = 21 if closed is None else closed + 2
    assert lost == [f"{tmp_path / name}:{line}" for line in range(11, last + 1)]
    assert "in the row that begins at line 11" in next(row.broken for row in rows if row.broken)
    assert len(rows) == 20


def test_a_row_of_a_csv_is_told_by_its_first_line(tmp_path: Path) -> None:
    rows = read(tmp_path / "mine.csv", 'text\n"a\nb"\nc\n')
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "4"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", ["data[1]", "da*a1", "data?"])
def test_a_name_is_no_pattern(tmp_path: Path, kind: str, name: str) -> None:
    for stem in ("data1", name):
        table = pyarrow.table({"text": [stem]})
        if kind == "parquet":
            parquet.write_table(table, tmp_path / f"{stem}.{kind}")
        else:
            with pyarrow.ipc.new_stream(str(tmp_path / f"{stem}.{kind}"), table.schema) as stream:
                stream.write_table(table)
    assert [row.record for row in of_files([tmp_path / f"{name}.{kind}"])] == [{"text": name}]


def test_a_parquet_file_tells_how_far_it_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": str(place)} for place in range(4)]).to_parquet(tmp_path / "mine.parquet")
    assert [row.share for row in of_files([tmp_path / "mine.parquet"])] == [0.25, 0.5, 0.75, 1.0]


def test_a_columnar_file_holds_the_same_conversations_as_the_lines_it_was_made_of(tmp_path: Path) -> None:
    """Columnar files give each object the keys of all: `name`, and both arguments, would be there with null."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "1"}}}]}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"y": "2"}}}]}
    records = [talk("b"), talk("c", name="d"), {"messages": [call]}, {"messages": [other]}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "mine.parquet")
    lines, columns = ([row.record for row in of_files([tmp_path / f"mine.{kind}"])] for kind in ("jsonl", "parquet"))
    assert lines == columns
    twin = {"messages": [{**records[0]["messages"][0], "name": None}, records[0]["messages"][1]]}
    again, first = example.parse(twin, {}).example, example.parse(records[0], {}).example
    assert not isinstance(again, str)
    assert not isinstance(first, str)
    assert example.digest(again) == example.digest(first)


def test_a_date_in_a_message_is_no_fault(tmp_path: Path) -> None:
    said = [talk("b c", at=datetime.datetime(2020, 1, number, tzinfo=datetime.UTC)) for number in range(1, 5)]
    parquet.write_table(pyarrow.Table.from_pylist(said), tmp_path / "mine.parquet")
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}")
    config = whole(of_file(tmp_path / "mine.parquet", chat_template=str(tmp_path / "chat.jinja")))
    assert load_data(config, words(None)).report.train.examples == 4


def test_an_archive_with_a_wrong_byte_is_one_fault(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"".join(b'{"text": "a %d"}\n' % number for number in range(5000))))
    packed[100:110] = b"\xff" * 10
    (tmp_path / "mine.jsonl.gz").write_bytes(packed)
    with pytest.raises(Unreadable, match=r"mine\.jsonl\.gz"):
        list(of_files([tmp_path / "mine.jsonl.gz"]))
    (fault,) = faults_of(of_file(tmp_path / "mine.jsonl.gz"))
    assert fault.startswith("data.path: cannot be read (")


@pytest.mark.parametrize("other", ["val", "testing", "holdout", "held-out", "dev", "eval"])
@pytest.mark.parametrize("train", ["train", "training"])
def test_a_folder_with_a_set_to_be_measured_on_is_not_trained_on_as_a_whole(
    tmp_path: Path, train: str, other: str
) -> None:
    for name in (train, other):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(Unreadable, match="holds files of several splits"):
        source.of_path(str(tmp_path))


def test_linked_folders_are_read_and_what_is_passed_over_is_told(tmp_path: Path) -> None:
    folder, far = tmp_path / "folder", tmp_path / "far"
    for each in (folder, far):
        each.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (far / "b.jsonl").write_text('{"text": "b"}\n')
    (folder / "far").symlink_to(far)
    (folder / "itself").symlink_to(folder)
    (folder / "_c.jsonl").write_text('{"text": "c"}\n')
    (folder / ".d.jsonl").write_text('{"text": "d"}\n')
    rows = source.of_path(str(folder))
    assert [row.record["text"] for row in rows.rows()] == ["a", "b"]
    assert rows.passed_over == ("_c.jsonl",)


def test_what_is_told_of_a_folder_is_of_the_folder_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n' * 3 + "broken\n")
    config = whole(of_file(folder))
    first = load_data(config, words(None))
    (folder / "a.jsonl").rename(folder / "z.jsonl")
    (folder / "b.xlsx").write_bytes(b"PK")
    again = load_data(config, words(None))
    assert rows(again.train) == rows(first.train)
    warnings = " ".join(again.report.warnings())
    assert "z.jsonl:4" in warnings
    assert "a.jsonl" not in warnings
    assert "passed over: b.xlsx" in warnings


def zeros(count: int) -> bytes:
    return gzip.compress(bytes(count), 9)


BOMBS: dict[str, Callable[[Path], None]] = {
    "a.jsonl.gz": lambda file: file.write_bytes(zeros(2**27)),
    "a.json.gz": lambda file: file.write_bytes(zeros(2**27)),
    "a.csv.gz": lambda file: file.write_bytes(gzip.compress(b"prompt,completion\n") + zeros(2**27)),
    "a.tsv.gz": lambda file: file.write_bytes(gzip.compress(b'prompt\tcompletion\n"') + zeros(2**27)),
    "a.txt.gz": lambda file: file.write_bytes(gzip.compress(b"\n" * 2**27, 9)),
    "a.jsonl": lambda file: os.truncate(make(file), 2**40),
    "a.json": lambda file: os.truncate(make(file), 2**40),
    "a.csv": lambda file: os.truncate(make(file, b"prompt,completion\n"), 2**40),
    "a.txt": lambda file: os.truncate(make(file), 2**40),
    "b.jsonl": os.mkfifo,
    "b.parquet": os.mkfifo,
    "c.jsonl": lambda file: file.symlink_to("/dev/zero"),
    "d.parquet": lambda file: file.write_bytes(b"PAR1" + bytes(100) + b"PAR1"),
}


def make(file: Path, content: bytes = b"") -> Path:
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_floods_or_never_ends_is_refused_in_one_line_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("lora_sweep.data.file_rows.ENDLESS_BYTES", 2**27)
    BOMBS[name](tmp_path / name)
    # Read until it is refused; in a FIFO's place nothing may be waited for.
    began = time.process_time()  # neighbours on the machine add to the other clock
    with bounded(20, 2**30):
        (line,) = faults_of(of_file(tmp_path / name))
    assert time.process_time() - began < 10
    assert line.startswith("data.path: ")
    assert str(tmp_path) in line


def test_one_odd_file_in_a_folder_of_good_ones_is_passed_over_and_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    os.mkfifo(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").symlink_to("/dev/zero")
    rows = source.of_path(str(tmp_path))
    assert [row.record for row in rows.rows()] == [{"text": "a"}]
    assert rows.passed_over == ("b.jsonl", "c.jsonl")


def test_text_that_compresses_well_is_read_to_its_end(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "x" * 500, "completion": "y"}) + "\n"
    content = "".join(line.replace("y", str(number)) for number in range(2**17)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content, 9))
    assert sum(1 for _ in of_files([tmp_path / "a.jsonl.gz"])) == 2**17
