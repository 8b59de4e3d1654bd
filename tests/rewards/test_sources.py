"""rewards/sources.py: what a reward may be, and what happens to one that is broken."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetune_kit.data.chat import end_token_ids, render_prompt
from finetune_kit.data.records import Prompt
from finetune_kit.data.token_ids import ids_of
from finetune_kit.errors import DataError, NumericsError, SettingsError
from finetune_kit.models.load import load_policy
from finetune_kit.models.provenance import BASE_RECORD, base_record
from finetune_kit.models.reward import load_reward_model
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.rewards.models import shares_base
from finetune_kit.rewards.settings import RewardConfig
from finetune_kit.rewards.sources import Part, Rewards, load_rewards
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.rl.fixtures import write_home

RECORDS = [Prompt(f"rows.jsonl:{n}", [{"role": "user", "content": f"count to {n}"}]) for n in (1, 2, 3)]
PROMPTS, ANSWERS = ["count to 1", "count to 2", "count to 3"], ["one", "", "1 2 3"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`; `full` and `adapter`: reward models of it, one whole and one a LoRA adapter with its own head."""
    home = write_home(tmp_path_factory.mktemp("rewards"))
    for name, lora in (("full", None), ("adapter", LoraConfig())):
        model = ModelConfig(name_or_path=str(home / "tiny"))
        tokenizer = load_tokenizer(model)
        judge = load_reward_model(model, lora, tokenizer, end_token_ids(tokenizer), seed=1)
        with torch.no_grad():
            for parameter in judge.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 20)
        judge.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return home


def data_of(score: Any = None) -> Any:
    return SimpleNamespace(score=score, chat_template_kwargs={}, train_records=RECORDS, held_out_records=[])


def loaded(home: Path, score: Any = None, **settings: Any) -> Rewards:
    return load_rewards(RewardConfig(**settings), data_of(score), ModelConfig(name_or_path=str(home / "tiny")))


def single(function: Any) -> Rewards:
    return Rewards((Part("mine", 1.0, function),))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_two_rewards_are_added_with_their_weights_and_logged_by_name(tmp_path: Path, home: Path) -> None:
    file = write(
        tmp_path / "mine.py", "def length(prompts, completions, records): return [len(c) for c in completions]"
    )
    rewards = loaded(
        home, lambda text, meta: float("o" in text), sources=["task", f"{file}:length"], weights=[10, -0.5]
    )
    total, parts = rewards(PROMPTS, ANSWERS, RECORDS)
    assert parts == {"task": [1, 0, 0], "length": [3, 0, 5]}
    assert total == [10 - 1.5, 0, -2.5]


def test_a_function_gets_last_turns_answers_and_records(home: Path) -> None:
    given: list[Any] = []

    def score(prompts: Any, completions: Any, records: Any) -> list[float]:
        given.extend([prompts, completions, records])
        return [0, 1, 2]

    assert single(score)(PROMPTS, ANSWERS, RECORDS)[0] == [0, 1, 2]
    assert given == [PROMPTS, ANSWERS, RECORDS]


def test_a_function_that_raises_is_named_with_the_row_and_the_cause() -> None:
    with pytest.raises(DataError, match=r"mine raised ZeroDivisionError at rows.jsonl:2 \(completion ''\)"):
        single(lambda p, c, r: [1 / len(text) for text in c])(PROMPTS, ANSWERS, RECORDS)


@pytest.mark.parametrize("scores", [[1, 2], [1, 2, 3, 4], []])
def test_a_wrong_number_of_scores_is_refused_with_both_numbers(scores: list[float]) -> None:
    with pytest.raises(DataError, match=f"{len(scores)} scores for 3 completions"):
        single(lambda p, c, r: scores)(PROMPTS, ANSWERS, RECORDS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, pytest.param(10**400, id="10**400")])
def test_a_score_that_is_no_number_is_refused_with_its_row(bad: float) -> None:
    with pytest.raises(NumericsError, match=r"is (nan|inf) at rows.jsonl:3"):
        single(lambda p, c, r: [0, 1, bad])(PROMPTS, ANSWERS, RECORDS)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned None; expected a list"),
        (3.0, r"returned float \('3.0'\); expected a list"),
        ({"a": 1, "b": 2, "c": 3}, "returned dict"),
        ("123", "returned str"),
        (torch.ones(3, 1), r"shape \(3, 1\)"),
        ([0, "b", 0], r"returned str \('b'\) at rows.jsonl:2; expected a number"),
        ([0, 0, [1]], r"returned list \('\[1\]'\) at rows.jsonl:3"),
        ([1j, 0, 0], r"returned complex \('1j'\) at rows.jsonl:1"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(answer: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        single(lambda p, c, r: answer)(PROMPTS, ANSWERS, RECORDS)


@pytest.mark.parametrize(
    "answer",
    [
        (True, 0, 2),
        np.array([1.0, 0.0, 2.0]),
        torch.tensor([1.0, 0.0, 2.0]),
        [np.float32(1), torch.tensor(0.0), Decimal(2)],
        [np.bool_(True), np.int64(0), Fraction(2)],
    ],
)
def test_numbers_of_python_numpy_and_torch_are_scores(answer: Any) -> None:
    assert single(lambda p, c, r: answer)(PROMPTS, ANSWERS, RECORDS)[0] == [1, 0, 2]


def test_where_a_reward_gives_none_the_others_alone_count_and_where_all_do_there_is_no_score() -> None:
    one = Part("one", 2.0, lambda p, c, r: [None, 1.0, None])
    other = Part("other", 1.0, lambda p, c, r: [5.0, 3.0, None])
    total, parts = Rewards((one, other))(PROMPTS, ANSWERS, RECORDS)
    assert total[:2] == [5.0, 5.0]
    assert math.isnan(total[2])
    assert [math.isnan(score) for score in parts["one"]] == [True, False, True]
    assert Rewards((one, other)).judge(PROMPTS, ANSWERS, RECORDS) == [5.0, 5.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "is empty"),
        ({"sources": ["task"], "weights": [1.0, 2.0]}, "2 numbers for 1 source"),
        ({"sources": ["task", "task"]}, "one source twice"),
        ({"sources": ["task"]}, "no scorer of their own"),
        ({"sources": ["nowhere.py:score"]}, "no such file"),
        ({"sources": ["nowhere.py"]}, "names no function"),
        ({"sources": ["./no/such/folder"]}, "no such folder"),
    ],
)
def test_a_source_that_cannot_be_is_refused(home: Path, settings: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        loaded(home, None, **settings)


def test_a_file_without_the_function_or_with_an_error_in_it_is_refused(tmp_path: Path, home: Path) -> None:
    with pytest.raises(SettingsError, match="has no function score"):
        loaded(home, sources=[write(tmp_path / "a.py", "x = 1") + ":score"])
    with pytest.raises(SettingsError, match="cannot be imported: NameError"):
        loaded(home, sources=[write(tmp_path / "b.py", "y") + ":score"])


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_a_reward_model_scores_each_text_as_it_does_alone(home: Path, name: str) -> None:
    rewards = loaded(home, sources=[str(home / name)])
    total, parts = rewards(PROMPTS, ANSWERS, RECORDS)
    assert list(parts) == [name]
    assert len(set(total)) == 3
    tokenizer = AutoTokenizer.from_pretrained(home / name)
    model = AutoModelForSequenceClassification.from_pretrained(
        home / ("tiny" if name == "adapter" else name), num_labels=1
    )
    if name == "adapter":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, home / name)
    model.eval()
    for answer, record, score in zip(ANSWERS, RECORDS, total, strict=True):
        ids = [*render_prompt(tokenizer, record.messages), *ids_of(tokenizer, answer), end_token_ids(tokenizer)[0]]
        with torch.no_grad():
            assert float(model(input_ids=torch.tensor([ids])).logits) == pytest.approx(score, abs=1e-5)


def test_an_adapter_on_the_policys_base_scores_beside_it_as_it_does_alone_and_the_policy_stays_as_it_is(
    home: Path, tmp_path: Path
) -> None:
    import shutil

    model = ModelConfig(name_or_path=str(home / "tiny"))
    folder = tmp_path / "judge"
    shutil.copytree(home / "adapter", folder)
    (folder / BASE_RECORD).write_text(json.dumps(base_record(model)))
    policy = load_policy(model, LoraConfig(r=4)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
        before = policy(input_ids=torch.tensor([[5, 6, 7]])).logits
        trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        alone, _ = loaded(home, sources=[str(home / "adapter")])(PROMPTS, ANSWERS, RECORDS)
        config = RewardConfig(sources=[str(folder)])
        rewards = load_rewards(config, data_of(), model, policy)
        assert shares_base(folder, model, policy)
        assert not shares_base(home / "adapter", model, policy)  # no record of its base
        assert not shares_base(folder, ModelConfig(name_or_path=str(home / "tiny"), load_in_4bit=True), policy)
        assert not shares_base(home / "full", model, policy)
        count = sum(parameter.numel() for parameter in policy.parameters())
        assert rewards(PROMPTS, ANSWERS, RECORDS)[0] == pytest.approx(alone, abs=1e-5)
        assert torch.equal(policy(input_ids=torch.tensor([[5, 6, 7]])).logits, before)
    assert policy.active_adapter == "default"
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained
    assert count < 1.5 * sum(p.numel() for p in load_policy(model, LoraConfig(r=4)).parameters())  # no second base


def test_a_reward_model_with_another_tokenizer_reads_the_texts_by_its_own(home: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(home / "full", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "other")
    total, _ = loaded(home, sources=[str(tmp_path / "other")])(PROMPTS, ANSWERS, RECORDS)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other").eval()
    ids = ids_of(tokenizer, "[user] count to 1<|im_end|>[assistant] one<|im_end|>")
    with torch.no_grad():
        assert float(model(input_ids=torch.tensor([ids])).logits) == pytest.approx(total[0], abs=1e-5)


def test_a_language_model_is_no_reward_model(home: Path) -> None:
    with pytest.raises(SettingsError, match="LlamaForCausalLM: no reward model"):
        loaded(home, sources=[str(home / "tiny")])


def test_a_reward_model_that_did_not_pass_its_gate_is_refused_unless_told(home: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "judge"
    shutil.copytree(home / "full", folder)
    gate = {"passed": False, "reason": "no better than the length rule"}
    (folder / "report.json").write_text(json.dumps({"gate": gate}))
    with pytest.raises(SettingsError, match="no better than the length rule") as caught:
        loaded(home, sources=[str(folder)])
    assert "reward.ignore_gate=true" in caught.value.fix
    assert len(loaded(home, sources=[str(folder)], ignore_gate=True)(PROMPTS, ANSWERS, RECORDS)[0]) == 3
    (folder / "report.json").write_text(json.dumps({"gate": {"passed": True, "reason": ""}}))
    assert loaded(home, sources=[str(folder)]).parts[0].name == "judge"
