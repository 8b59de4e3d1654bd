"""Prepared rows are found again: by whom, for how long, and what makes others of them."""

import json
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from finetune_kit.data import load, prepared, token_ids
from finetune_kit.data.load import Data, load_data
from finetune_kit.data.preview import preview_json
from finetune_kit.data.records import Prompt
from finetune_kit.data.stored import NotStored, Records, to_bytes
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.settings.schema import DataConfig
from tests.fixtures_cli import cli
from tests.fixtures_data import assistant, bpe_tokenizer, user, write_jsonl

ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt_completion": [
        {
            "messages": [
                user(f"q {n}"),
                assistant("a" * (n % 7)),
                user("and <|im_end|>?"[: 3 + n % 2 * 20]),
                assistant(f"b {n}"),
            ],
            "id": n,
        }
        for n in range(60)
    ],
    "prompt": [{"prompt": f"q {n}", "answer": str(n), "level": [n, {"k": None}]} for n in range(60)],
    "preference": [{"prompt": f"q {n}", "chosen": f"a {n}", "rejected": "b", "margin": n / 3} for n in range(60)],
    "labelled_completion": [{"prompt": f"q {n}", "completion": f"a {n}", "label": n % 2 == 0} for n in range(60)],
    "text": [{"text": f"The ship {n} sailed on. " + " ".join(f"{n}.{word}" for word in range(n))} for n in range(60)],
}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own."""
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(prepared.LIMIT, "1")
    yield tmp_path / "cache" / "data"
    prepared.release()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts became tokens in each call of a tokenizer."""
    calls: list[int] = []
    real = token_ids.ids_of_all
    monkeypatch.setattr(
        token_ids, "ids_of_all", lambda tokenizer, texts: calls.append(len(texts)) or real(tokenizer, texts)
    )
    return calls


def given(data: Data) -> tuple[Any, ...]:
    """All that a trainer, an evaluation and a person are given."""
    return (
        *(data.kind, data.train.to_dict(), data.held_out.to_dict(), data.train.features),
        *(list(data.train_records), list(data.held_out_records), data.ledger, data.end_token_ids, data.packed),
        json.dumps(preview_json(data, bpe_tokenizer())),
    )


@pytest.mark.parametrize("kind", ROWS)
def test_a_second_start_tokenises_nothing_and_has_the_same(
    kind: str, tmp_path: Path, kept: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", ROWS[kind]), max_length=120, max_lost=1)
    first = given(load_data(config, kind, bpe_tokenizer()))
    assert sum(asked) >= 30
    asked.clear()
    second = given(load_data(config, kind, bpe_tokenizer()))
    assert asked == []
    monkeypatch.setenv(prepared.LIMIT, "0")
    assert first == second == given(load_data(config, kind, bpe_tokenizer()))
    assert asked


def test_the_template_that_a_tokenizer_was_given_is_given_again(tmp_path: Path, kept: Path, asked: list[int]) -> None:
    config = DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", ROWS["prompt_completion"]), max_lost=1)
    templates = []
    for _ in range(2):
        tokenizer = bpe_tokenizer(None)
        asked.clear()
        load_data(config, "prompt_completion", tokenizer)
        templates.append(tokenizer.chat_template)
    assert asked == []
    assert "User:" in templates[0] == templates[1]


CHANGES: dict[str, Callable[[Path, DataConfig], tuple[DataConfig, int, Any]]] = {
    "a row": lambda path, c: (path.write_text(path.read_text().replace("q 3", "q x")) and c, 0, bpe_tokenizer()),
    "a setting": lambda _, c: (DataConfig(path=c.path, max_lost=1, max_length=77), 0, bpe_tokenizer()),
    "the seed": lambda _, c: (c, 1, bpe_tokenizer()),
    "the template": lambda _, c: (c, 0, bpe_tokenizer(bpe_tokenizer().chat_template.replace("\n", "\n\n"))),
    "a token": lambda _, c: (c, 0, bpe_tokenizer(specials=("<|im_start|>", "<|im_end|>", "<x>"))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_rows_depend_on_makes_others_of_them(change: str, tmp_path: Path, kept: Path, asked: list[int]) -> None:
    path = tmp_path / "rows.jsonl"
    config = DataConfig(path=write_jsonl(path, ROWS["prompt_completion"]), max_lost=1)
    load_data(config, "prompt_completion", bpe_tokenizer())
    asked.clear()
    changed, seed, tokenizer = CHANGES[change](path, config)
    load_data(changed, "prompt_completion", tokenizer, seed)
    assert asked
    assert len(prepared.sets()) == 2


def test_of_several_that_start_at_once_one_prepares(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", ROWS["prompt_completion"]), max_lost=1)
    made, real = [], load._load_data

    def slow(*arguments: Any) -> Data:
        made.append(1)
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(load, "_load_data", slow)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: load_data(config, "prompt_completion", bpe_tokenizer()), range(3)))
    assert len(made) == 1
    assert given(found[0]) == given(found[1]) == given(found[2])


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_nobody_else_can_read_prepared_rows(tmp_path: Path, kept: Path) -> None:
    load_data(DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", ROWS["text"])), "text", bpe_tokenizer())
    assert kept.stat().st_mode & 0o077 == 0


def test_an_error_is_told_each_time_and_leaves_nothing(tmp_path: Path, kept: Path) -> None:
    config = DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", [*ROWS["prompt_completion"], {"messages": []}]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows.jsonl:61: the list of messages is empty"):
            load_data(config, "prompt_completion", bpe_tokenizer())
    assert prepared.sets() == []


def test_a_set_that_cannot_be_read_is_prepared_again(tmp_path: Path, kept: Path, asked: list[int]) -> None:
    config = DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", ROWS["prompt_completion"]), max_lost=1)
    first = given(load_data(config, "prompt_completion", bpe_tokenizer()))
    (facts,) = kept.glob(f"*/{prepared.FACTS}")
    facts.write_text(facts.read_text()[:40])
    prepared.release()
    asked.clear()
    assert given(load_data(config, "prompt_completion", bpe_tokenizer())) == first
    assert asked
    assert len(prepared.sets()) == 1


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv(prepared.LIMIT, "1")
    config = DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", ROWS["prompt_completion"]), max_lost=1)
    assert len(load_data(config, "prompt_completion", bpe_tokenizer()).train) > 30
    assert "prepared rows are not kept" in caplog.text


def test_the_days_of_a_table_come_back_as_days(tmp_path: Path, kept: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, day = tmp_path / "days.parquet", date(2026, 1, 2)
    pq.write_table(pa.table({"prompt": [f"question {n}?" for n in range(30)], "day": [day] * 30}), path)
    data = load_data(DataConfig(path=str(path)), "prompt", bpe_tokenizer())
    assert isinstance(data.train_records, Records)
    assert data.train_records[0].metadata["day"] == data.train_records[-1].metadata["day"] == day  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {1, 2}, float("nan"), {"\0type": 1}], ids=repr)
def test_a_value_that_would_not_come_back_is_not_stored(value: Any) -> None:
    with pytest.raises(NotStored):
        to_bytes(Prompt("rows:1", [user("a")], metadata={"column": value}))


def test_what_was_not_used_for_longest_goes_beyond_the_bound_and_what_is_in_use_stays(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_one(number: int) -> None:
        path = write_jsonl(tmp_path / f"{number}.jsonl", ROWS["text"])
        load_data(DataConfig(path=path), "text", bpe_tokenizer())

    def there() -> list[str]:
        return sorted(Path(one.what.split(":")[0]).name for one in prepared.sets())

    load_one(1)
    size = prepared.sets()[0].bytes
    monkeypatch.setenv(prepared.LIMIT, str(2.5 * size / 2**30))
    load_one(2)
    load_one(3)
    assert there() == ["1.jsonl", "2.jsonl", "3.jsonl"]  # this process uses all of them
    prepared.release()
    load_one(4)
    assert there() == ["3.jsonl", "4.jsonl"]
    monkeypatch.setenv(prepared.LIMIT, str(size / 2**31))
    load_one(5)  # larger than the bound by itself
    assert there() == ["3.jsonl", "4.jsonl"]


@pytest.mark.parametrize("limit", ["much", "-1", "nan"])
def test_a_bound_that_is_no_number_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(prepared.LIMIT, limit)
    with pytest.raises(SettingsError, match=r"FINETUNE_KIT_CACHE_GIB=.*expected a number of GiB"):
        prepared.most_bytes()


def test_memory_does_not_grow_with_the_rows_of_a_set_that_is_prepared(tmp_path: Path, kept: Path) -> None:
    peaks = []
    for count in (300, 3000):
        rows = [{"prompt": f"question {n}", "completion": f"answer {n} " * 20} for n in range(count)]
        config = DataConfig(path=write_jsonl(tmp_path / f"{count}.jsonl", rows))
        load_data(config, "prompt_completion", bpe_tokenizer())
        tokenizer = bpe_tokenizer()
        tracemalloc.start()
        data = load_data(config, "prompt_completion", tokenizer)
        assert sum(len(data.train[at]["input_ids"]) for at in range(0, len(data.train), 100)) > 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_the_command_lists_what_is_kept_and_clears_it(tmp_path: Path, tiny_model: Path, kept: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS["prompt_completion"])
    words = ("check", "lora_sft", f"model.name_or_path={tiny_model}", f"data.path={rows}", "data.max_lost=1")
    said = [cli(*words).out for _ in range(2)]
    assert said[0] == said[1] != ""
    assert "rows.jsonl: 60 prompt-completion rows" in cli("cache").out
    assert "1 sets of prepared rows" in cli("cache", "--clear").out  # in use by this process
    prepared.release()
    cleared = cli("cache", "--clear").out
    assert "freed in" in cleared
    assert "0 sets of prepared rows" in cleared
