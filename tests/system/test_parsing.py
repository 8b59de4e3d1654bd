"""Whatever a file holds, the parser ends with a value or with a message that names file and line."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_kit.data import files
from finetune_kit.data.files import data_files, read_csv, read_json, read_jsonl, read_txt
from finetune_kit.data.messages import parse_json
from finetune_kit.errors import DataError, SecurityError, SettingsError
from finetune_kit.models.adapter_config import read_adapter_config
from finetune_kit.models.provenance import weights_stamp
from finetune_kit.rewards.models import check_gate
from finetune_kit.rl.checkpoint import NUMBERS, TENSORS, read_checkpoint
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.system.parsing import DEEPEST, NotJSON, parse, read_object

GOOD = '{"prompt": "a", "completion": "b"}'
BAD = {
    "a number of 5,000 digits": ('{"score": ' + "9" * 5000 + "}", "a number of more than 4,300 digits"),
    "1e400": ('{"score_chosen": 1e400}', "1e400 is beyond what a number can hold"),
    "-1e999 in a list": ('{"a": [1, {"b": -1e999}]}', "-1e999 is beyond what a number can hold"),
    "NaN": ('{"a": NaN}', "NaN is not JSON"),
    "100,000 brackets": ('{"a": ' + "[" * 100_000, "nested too deeply"),
    "300 levels": ('{"a": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
    "a name twice": ('{"a": 1, "a": 2}', "'a' is written twice in one object"),
    "half an object": ('{"a": ', "broken JSON"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_what_no_row_can_mean_is_said_with_file_and_line(text: str, said: str, tmp_path: Path) -> None:
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(f"{GOOD}\n{text}\n{GOOD}\n")
    with pytest.raises(DataError, match=said) as caught:
        read_jsonl(lines)
    assert f"{lines}:2" in caught.value.message
    whole.write_text(f"[{GOOD},\n{text}]")
    with pytest.raises(DataError, match=said) as caught:
        read_json(whole)
    if "deeply" not in said and "twice" not in said:
        assert f"{whole}:2" in caught.value.message
    passed = []
    assert len(read_jsonl(lines, lambda where, error: passed.append(where))) == 2
    assert passed == ["rows.jsonl:2"]


def test_deep_but_not_too_deep_is_read() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert parse(text) == json.loads(text)


@given(st.text(max_size=30) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_text_is_a_value_or_no_json(text: str) -> None:
    with contextlib.suppress(NotJSON):
        assert parse(text) == json.loads(text)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"[" * 100_000, b"[1]"])
def test_a_file_of_settings_that_is_none_names_itself(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "identity.json").write_bytes(content)
    with pytest.raises(SettingsError, match=r"identity\.json"):
        read_object(tmp_path / "identity.json")
    with pytest.raises(SettingsError, match=r"none\.json cannot be read: No such file"):
        read_object(tmp_path / "none.json")


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_a_sparse_tebibyte_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"huge\.json has 1,024\.0 GiB") as caught:
        read_json(sparse(tmp_path / "huge.json", 2**40))
    assert caught.value.fix.endswith("jq -c '.[]' huge.json > huge.jsonl")
    with pytest.raises(DataError, match=r"huge\.txt has 1,024\.0 GiB"):
        read_txt(sparse(tmp_path / "huge.txt", 2**40))


def test_a_line_without_an_end_is_refused_in_csv_as_in_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_LINE", 2**16)
    with pytest.raises(DataError, match=r"huge\.csv:1: a line of more than"):
        read_csv(sparse(tmp_path / "huge.csv", 40 * 2**30))
    with pytest.raises(DataError, match=r"huge\.jsonl:1: a line of more than"):
        read_jsonl(sparse(tmp_path / "huge.jsonl", 40 * 2**30))


def test_an_integer_too_large_for_a_float_is_its_row_s_mistake() -> None:
    with pytest.raises(DataError, match=r"rows:3: a number that is too large"), files.row_at("rows:3", files.refuse):
        float(10**400)


def test_a_snapshot_of_the_hub_s_cache_is_read_through_its_links_and_no_other_link_is(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "abc"
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1234").write_text(GOOD)
    (snapshot / "data" / "train.jsonl").symlink_to("../../../blobs/1234")
    for folder in (snapshot, snapshot / "data"):
        assert data_files(folder)[0] == [snapshot / "data" / "train.jsonl"]
    (tmp_path / "secret.jsonl").write_text(GOOD)
    (snapshot / "data" / "more.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(SecurityError, match=r"outside the data's folder"):
        data_files(snapshot)


TORN = {
    "cut": '{"peft_type": ',
    "deep": "[" * 100_000,
    "digits": '{"r": ' + "9" * 5000 + "}",
    "a list": "[]",
    "no UTF-8": b'{"r": "\xff"}',
}


@pytest.mark.parametrize("kind", TORN)
def test_files_of_folders_that_others_made_are_refused_by_name_whatever_is_in_them(kind: str, tmp_path: Path) -> None:
    content = TORN[kind]
    raw = content if isinstance(content, bytes) else content.encode()
    index = tmp_path / "model.safetensors.index.json"
    for name in ("adapter_config.json", "report.json", index.name):
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / NUMBERS).write_bytes(raw)
    (tmp_path / TENSORS).write_bytes(b"")
    readers: dict[str, Callable[[], Any]] = {
        "adapter_config.json": lambda: read_adapter_config(tmp_path),
        "report.json": lambda: check_gate(tmp_path, ignore=False),
        NUMBERS: lambda: read_checkpoint(tmp_path),
        index.name: lambda: weights_stamp(ModelConfig(name_or_path=str(tmp_path))),
    }
    for name, read in readers.items():
        with pytest.raises(SettingsError) as caught:
            read()
        assert name in caught.value.message
    if isinstance(content, str) and kind != "a list":
        with pytest.raises(DataError, match=r"rows.jsonl:3: expected JSON"):
            parse_json(content, "rows.jsonl:3")
