"""Files to rows: what is broken is named with file, line and column."""

import bz2
import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pytest

from finetune_kit.data.files import COMPRESSED, data_files, read_csv, read_json, read_jsonl, read_txt
from finetune_kit.data.load import load_records
from finetune_kit.errors import DataError
from finetune_kit.settings.schema import DataConfig

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda part: pa.Codec("zstd").compress(part, asbytes=True)}
ROWS = [{"question": "a, b?", "answer": "1\n2"}, {"question": "é “漢”?", "answer": "2"}]


def contents(path, text, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"data": ROWS, "version": 1})),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("a.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, ROWS)) + "\r\n"),
        ("a.csv", 'question,answer\r\n"a, b?","1\n2"\r\né “漢”?,2\r\n'),
        ("a.csv", '\ufeffquestion,answer\n"a, b?","1\n2"\n\né “漢”?,2'),
    ],
    ids=["list", "data", "jsonl in .json", "blank lines", "BOM and CRLF", "csv", "csv with BOM"],
)
def test_the_same_rows_come_out_of_every_kind_of_file(name, text, tmp_path):
    records = load_records(str(contents(tmp_path / name, text)), DataConfig())
    assert [[turn["content"] for turn in record.messages] for record in records] == [list(row.values()) for row in ROWS]


def test_parquet_gives_the_same_rows_and_leaves_no_cache(tmp_path, monkeypatch):
    import datasets

    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}]]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"messages": turns, "tools": [None]}).to_parquet(str(path))
    (record,) = load_records(str(path), DataConfig())
    assert record.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert record.where == "a.parquet:1"
    with pytest.raises(DataError, match=r"bad.parquet: not readable as Parquet"):
        load_records(str(contents(tmp_path / "bad.parquet", "no")), DataConfig())


def test_rows_are_numbered_by_the_line_they_begin_on(tmp_path):
    path = contents(tmp_path / "a.csv", 'x,y\n"1\n1",2\n3,4\n')
    assert [number for number, _ in read_csv(path)] == [2, 4]
    assert [number for number, _ in read_jsonl(contents(tmp_path / "a.jsonl", '{}\n\n{"a": 1}\n'))] == [1, 3]


BROKEN = {
    "a line cut off": ("a.jsonl", '{"a": 1}\n{"a": \n', r"a.jsonl:2:7: broken JSON: Expecting value"),
    "single quotes": ("a.jsonl", "{'a': 1}", r"a.jsonl:1:2: broken JSON"),
    "NaN": ("a.jsonl", '{"a": 1}\n{"a": NaN}', r"a.jsonl:2: NaN is not JSON"),
    "NaN in a list": ("a.json", '[{"a": 1},\n{"a": NaN}]', r"a.json:2: NaN is not JSON"),
    "no object": ("a.jsonl", "[1]", r"a.jsonl:1: a row is list; expected an object"),
    "a broken list": ("a.json", '[{"a": 1},\n {"a" 2}]', r"a.json:2:7: broken JSON"),
    "a number alone": ("a.json", "4", r"a.json: expected a list of rows, found int"),
    "latin-1": ("a.jsonl", '{}\n{"a": "é"}'.encode("latin-1"), r"a.jsonl:2: not UTF-8 \(byte 0xe9\)"),
    "latin-1 in a list": ("a.json", '[{},\n{"a": "é"}]'.encode("latin-1"), r"a.json:2: not UTF-8"),
    "utf-16": ("a.csv", "a,b\n1,2".encode("utf-16"), r"a.csv:1: not UTF-8 \(UTF-16\)"),
    "a field too many": ("a.csv", "a,b\n1,2\n1,2,3\n", r"a.csv:3: 3 fields; the header has 2 \(a, b\)"),
    "a column twice": ("a.csv", "a,a\n1,2\n", r"a.csv:1: a column name is written twice"),
    "an open quote": ("a.csv", 'a,b\n1,2\n"3,4\n', r"a.csv:3: broken CSV"),
    "an empty file": ("a.jsonl", "", r"a.jsonl: no rows"),
    "an empty list": ("a.json", "[]", r"a.json: no rows"),
    "a header alone": ("a.csv", "a,b\n", r"a.csv: no rows"),
    "nested for ever": ("a.jsonl", "[" * 200_000, r"a.jsonl:1: JSON nested too deeply"),
    "no gzip": ("a.jsonl.gz", "PK", r"a.jsonl.gz: broken gzip: .*\nWrite it again, or give it its name: a.jsonl"),
    "half a gzip": ("a.csv.gz", gzip.compress(bytes(range(256)) * 99)[:300], r"a.csv.gz: broken gzip"),
    "no zstd": ("a.json.zst", "PK" * 9, r"a.json.zst: broken zstd"),
    "nothing": ("a.txt.zst", "", r"a.txt.zst: an empty file, where zstd was expected"),
    "a bad row in a gzip": ("a.jsonl.gz", gzip.compress(b'{}\n{"a": 1'), r"a.jsonl.gz:2:8: broken JSON"),
    "compressed by something else": ("a.jsonl.xz", "PK", r"a.jsonl.xz: compressed.\nunxz a.jsonl.xz"),
    "a compressed table": ("a.parquet.gz", "PK", r"a.parquet.gz: compressed.\ngunzip a.parquet.gz"),
    "a name that says nothing": ("a.gz", "PK", r"gunzip a.gz, or let its name say what is in it: a.jsonl.gz"),
    "compressed under another name": ("a.jsonl", gzip.compress(b"{}"), r"a.jsonl is compressed by gzip.\nmv a.jsonl"),
    "another kind": ("a.xlsx", "PK", r"a.xlsx: cannot read this kind of file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_data_error_with_its_place(name, tmp_path):
    file, text, message = BROKEN[name]
    with pytest.raises(DataError, match=message):
        load_records(str(contents(tmp_path / file, text)), DataConfig())


@pytest.mark.parametrize("codec", COMPRESSED)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_a_compressed_file_has_the_rows_of_the_file(suffix, codec, tmp_path):
    rows = [{"prompt": f"q {n}é", "completion": "a\nb" * n} for n in range(1, 50)]
    written = {
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".json": json.dumps(rows),
        ".csv": "prompt,completion\n" + "".join(f'{row["prompt"]},"{row["completion"]}"\n' for row in rows),
        ".txt": "".join(f"{row['prompt']}\n" for row in rows),
    }[suffix].encode()
    plain, packed = tmp_path / f"rows{suffix}", tmp_path / f"rows{suffix}{codec}"
    plain.write_bytes(written)
    half = len(written) // 2
    with packed.open("wb") as file:  # two members, as of files laid end to end
        for part in (written[:half], written[half:]):
            file.write(PACK[codec](part))
    found = [load_records(str(path), DataConfig()) for path in (plain, packed)]
    assert len(found[0]) >= 1
    for one, other in zip(*found, strict=True):
        assert replace(other, where=one.where) == one
        assert other.where == one.where.replace(suffix, suffix + codec)


def test_a_folder_of_compressed_shards_is_read_in_order_and_a_bad_row_is_told_by_file_and_line(tmp_path):
    for shard in range(3):
        rows = "".join(json.dumps({"prompt": f"{shard} {n}", "completion": "a"}) + "\n" for n in range(4))
        (tmp_path / f"part-{shard}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "q", "completion": "a"}'))
    assert [path.name for path in data_files(tmp_path)[1]] == ["test.jsonl.gz"]
    records = load_records(str(tmp_path), DataConfig())
    asked = [record.messages[0]["content"] for record in records]
    assert asked == [*(f"{shard} {n}" for shard in range(3) for n in range(4)), "q"]
    (tmp_path / "part-1.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "q", "completion": "a"}\n{"prompt": 1,\n'))
    with pytest.raises(DataError, match=r"part-1.jsonl.gz:2:"):
        load_records(str(tmp_path), DataConfig())


@pytest.mark.parametrize("path", ["rows.jsonl", "./rows", "no/such/folder/rows"])
def test_a_missing_file_is_a_data_error_and_no_question_to_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune_kit.data.sources.hub_reachable", lambda: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match=rf"data.path={path}: no such file or folder"):
        load_records(path, DataConfig())


def test_a_folder_is_split_by_the_names_of_its_files(tmp_path):
    names = ("train.jsonl", "a_train_eval.jsonl", "more.csv", "test.jsonl", "my-valid-set.json", "sub/dev.jsonl")
    for name in (*names, "README.txt", "notes.md", ".hidden/a.jsonl", "latest.jsonl", "contest.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    train, held = data_files(tmp_path)
    assert {path.name for path in train} == {
        "train.jsonl", "a_train_eval.jsonl", "more.csv", "latest.jsonl", "contest.txt",
    }  # fmt: skip
    assert {path.name for path in held} == {"test.jsonl", "my-valid-set.json", "dev.jsonl"}


def test_a_folder_without_training_files_says_what_it_found(tmp_path):
    with pytest.raises(DataError, match="found no data file"):
        data_files(tmp_path)
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(DataError, match=r"only held-out files \(test.jsonl\)"):
        data_files(tmp_path)


def test_text_files_are_runs_of_whole_lines_of_at_most_4096_characters(tmp_path):
    text = "".join(f"line {i} " + "x" * (i % 90) + "\n" for i in range(5000))
    runs = read_txt(contents(tmp_path / "a.txt", text))
    assert "".join(run for _, run, _ in runs) == text
    assert all(len(run) <= 4096 and run.endswith("\n") for _, run, _ in runs)
    assert [ends for *_, ends in runs] == [False] * (len(runs) - 1) + [True]
    assert all(run.startswith(f"line {line - 1} ") for line, run, _ in runs)


def test_a_short_text_gives_shorter_runs_so_that_some_can_be_held_out(tmp_path):
    assert len(read_txt(contents(tmp_path / "a.txt", "a short line\n" * 500))) >= 20
    assert read_txt(contents(tmp_path / "b.txt", "")) == []


def test_json_rows_of_one_object_are_one_row(tmp_path):
    assert read_json(contents(tmp_path / "a.json", '{"a": 1}')) == [(1, {"a": 1})]
