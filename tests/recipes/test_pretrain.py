"""pretrain from no weights at all to a model that the other recipes continue from."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.data.load import training_texts
from finetune_kit.errors import DataError
from finetune_kit.runs.save import Artifact
from finetune_kit.settings.schema import DataConfig
from finetune_kit.training.checkpoint import checkpoints
from finetune_kit.training.fit import fit
from tests.fixtures_cli import cli
from tests.fixtures_training import Trained, fit_only, prepare, settings, train, write_rows

WHO, WHAT = ("Ann", "Bob", "Cleo"), ("ship", "sea", "wind", "sail")
TEXT = "".join(f"{WHO[n % 3]} saw the {WHAT[n % 4]} on day {n * 7 % 31}, naïve as ever.\n" for n in range(400))
LETTERS = "def score(prompts, completions, records):\n    return [float(len(text)) for text in completions]\n"
SPLIT = ("held_out_size=0.2",)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def run(home: Path) -> Artifact:
    """A whole run of 12 steps, continuing a held-out text after 6 and 12. Read only."""
    words = ("max_steps=12", "eval_steps=6", "save_steps=6", "learning_rate=2e-2", "sample_tokens=8", *SPLIT)
    return train("pretrain", home, *words)


def metric(artifact: Artifact, name: str) -> dict[str, Any]:
    return next(line for line in artifact.report.metrics if line["name"] == name)


def test_a_fresh_model_knows_nothing_and_12_steps_teach_it(run: Artifact) -> None:
    words = json.loads((run.folder / "config.json").read_text())["vocab_size"]
    loss = metric(run, "held_out_loss")
    assert loss["before"] == pytest.approx(math.log(words), abs=0.1)
    assert loss["after"] < 0.8 * loss["before"]
    assert run.report.improved


def test_bits_a_byte_are_the_nats_of_all_held_out_tokens_over_the_bytes_of_their_text(run: Artifact) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(run.folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    config = settings("pretrain", run.folder.parent, *SPLIT, f"output_dir={run.folder.parent / 'other'}")
    trained = set(training_texts(config.data, config.train.seed))
    from finetune_kit.data.files import runs_of

    texts = [(text, ends) for _, text, ends in runs_of(TEXT, "text.txt") if text not in trained]
    nats, count = 0.0, 0
    for text, ends in texts:
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ends
        for start in range(0, len(ids) - 1, 31):
            block = torch.tensor([ids[start : start + 32]])
            with torch.no_grad():
                nats += float(model(block, labels=block).loss) * (block.shape[1] - 1)
            count += block.shape[1] - 1
    assert count == sum(len(tokenizer(text)["input_ids"]) - 1 + ends for text, ends in texts)
    bits = nats / math.log(2) / sum(len(text.encode()) for text, _ in texts)
    assert metric(run, "held_out_bits_per_byte")["after"] == pytest.approx(bits, rel=1e-4)


def test_the_folder_is_a_plain_model_of_transformers_that_continues_a_text(run: Artifact) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = tokenizer("Ann saw", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=8, do_sample=False)
    ours = cli("generate", run.folder, "Ann saw", "--max-new-tokens", "8")
    assert ours.code == 0, ours.err
    assert ours.out.startswith(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_report_shows_how_held_out_texts_go_on_before_and_after(run: Artifact) -> None:
    assert len(run.report.samples) > 1
    for sample in run.report.samples:
        assert sample["prompt"] + sample["reference"] in TEXT
        assert sample["before"] != sample["after"]


def test_evaluate_makes_the_random_model_again_and_measures_the_same(run: Artifact) -> None:
    said = cli("evaluate", run.folder, "--json")
    assert said.code == 0, said.err
    again = {line["name"]: line for line in json.loads(said.out)["metrics"]}
    for line in run.report.metrics:
        assert again[line["name"]]["before"] == pytest.approx(line["before"], rel=1e-5)
        assert again[line["name"]]["after"] == pytest.approx(line["after"], rel=1e-5)


def test_full_sft_lora_sft_dpo_and_ppo_continue_from_the_run_in_its_template(run: Artifact, tmp_path: Path) -> None:
    (tmp_path / "tiny").symlink_to(run.folder, target_is_directory=True)
    write_rows(tmp_path / "rows.jsonl")
    tuned = fit_only("full_sft", tmp_path, "max_steps=2", "learning_rate=1e-3")
    first = tuned.data.train[0]
    shown = tuned.tokenizer.decode(first["input_ids"])
    assert shown.startswith("<|endoftext|><|im_start|>user\n")
    assert tuned.tokenizer.decode([label for label in first["labels"] if label >= 0]).endswith("<|im_end|>")
    assert tuned.data.end_token_ids == tuned.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(20)])
    pairs = fit_only("dpo", tmp_path, f"data.path={tmp_path / 'pairs.jsonl'}", "lora.r=0", "max_steps=2")
    assert pairs.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    adapted = fit_only("lora_sft", tmp_path, "max_steps=2", "learning_rate=1e-2")
    assert adapted.losses[1] < adapted.losses[0]
    (tmp_path / "letters.py").write_text(LETTERS)
    reward = f"reward.sources=[{tmp_path / 'letters.py'}:score]"
    words = ("max_new_tokens=6", "batch_size=8", "num_mini_batches=2", "max_steps=1", "evaluate.safety=null")
    prompts = f"data.path={write_rows(tmp_path / 'prompts.jsonl', [{'prompt': f'{n}?'} for n in range(20)])}"
    learned = train("ppo", tmp_path, prompts, reward, *words)
    assert (learned.folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("words", [(), ("optim=adamw_torch", "lr_scheduler_type=warmup_stable_decay")])
def test_cut_and_gone_on_it_is_the_uninterrupted_run_to_the_bit(home: Path, tmp_path: Path, words: Any) -> None:
    given = (*SPLIT, *words, "max_steps=6", "save_steps=1", "save_total_limit=9", "warmup_steps=2", "decay_steps=2")
    given = tuple(word for word in given if words or not word.startswith("decay"))

    def ready(folder: str) -> Trained:
        return prepare("pretrain", home, *given, f"output_dir={tmp_path / folder}")

    def finish(one: Trained) -> Trained:
        torch.manual_seed(12345)
        one.history = fit(one.trainer, one.config.train, one.score)
        return one

    whole = finish(ready("whole"))
    shutil.copytree(whole.folder, tmp_path / "cut")
    for checkpoint in checkpoints(tmp_path / "cut")[4:]:
        shutil.rmtree(checkpoint)
    resumed = finish(ready("cut"))
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    assert whole.losses == resumed.losses


def test_the_rate_of_warmup_stable_decay_rises_stays_and_falls_in_its_last_steps(home: Path) -> None:
    words = ("lr_scheduler_type=warmup_stable_decay", "decay_steps=0.4", "warmup_steps=2", "max_steps=10")
    found = fit_only("pretrain", home, *SPLIT, *words, "learning_rate=1e-2")
    rates = [line["learning_rate"] / 1e-2 for line in found.history if "loss" in line]
    assert rates[2:7] == [1.0] * 5
    assert rates[:2] == [0.0, 0.5]
    assert rates[7:] == pytest.approx([1 - math.sqrt(step / 4) for step in (1, 2, 3)], abs=1e-6)


def test_no_row_sees_another_and_every_one_is_its_own_document_s(home: Path) -> None:
    run = prepare("pretrain", home, *SPLIT, "max_steps=1", "per_device_train_batch_size=2")
    from finetune_kit.packing.forward import acts_on

    assert acts_on(run.model)
    rows = [torch.tensor([run.data.train[index]["input_ids"]]) for index in (0, 5)]
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])
    mask = torch.tensor([[1] * row.shape[1] + [0] * (width - row.shape[1]) for row in rows])
    with torch.no_grad():
        both = run.model(input_ids=ids, attention_mask=mask).logits
        for place, row in enumerate(rows):
            alone = run.model(input_ids=row).logits[0]
            assert float((both[place, : row.shape[1]] - alone).abs().max()) < 1e-4


def test_check_counts_tokens_a_parameter_and_operations(home: Path) -> None:
    words = ("depth=2", "tokenizer.vocab_size=300", "data.max_length=64", f"data.path={home / 'text.txt'}")
    said = cli("check", "pretrain", *words, *SPLIT, "num_train_epochs=2", "--json")
    assert said.code == 0, said.err
    plan = json.loads(said.out)["plan"]
    known = plan["compute"]
    assert known["epochs"] == pytest.approx(2, abs=0.2)
    assert known["tokens_a_parameter"] == pytest.approx(known["tokens"] / plan["parameters"])
    assert known["compute_optimal_tokens"] == 20 * plan["parameters"]
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 192) + 300 * 64
    assert known["flops"] / known["tokens"] / 6 == pytest.approx(matrices, rel=0.1)
    assert known["hours"] == pytest.approx(known["flops"] / known["flops_a_second"] / 3600)
    shown = cli("check", "pretrain", *words, *SPLIT, "--device", "cuda")
    assert "compute-optimal are about 20" in " ".join(shown.out.split())
    assert "timed here" not in shown.out


def test_sources_are_mixed_by_weight_and_the_tokenizer_learns_from_no_held_out_text(home: Path) -> None:
    other = home / "other.txt"
    other.write_text("".join(f"Zebra number {n} is {n % 9} years old today.\n" for n in range(300)))
    config = DataConfig(path=[str(home / "text.txt"), str(other)], weights=[1, 3], held_out_size=4)
    texts = list(training_texts(config))
    zebras = sum("Zebra" in text for text in texts)
    assert zebras / len(texts) == pytest.approx(0.75, abs=0.05)
    assert not set(texts) & {text for text in texts if text not in TEXT + other.read_text()}


@pytest.mark.parametrize(
    ("files", "words", "said"),
    [
        ({"a.jsonl": '{"prompt": "1?", "completion": "1"}\n' * 3}, (), "this recipe needs text rows"),
        ({"a.txt": "Short.\n"}, (), "none can be held out"),
        ({"a.txt": b"\x7fELF\0\0 binary \0"}, (), "a binary file, not text: byte 5 is 0"),
        ({"a.txt": b"\xff\xd8\xff\xe0 no zero in it"}, (), "not UTF-8"),
        ({"a.txt": "a b\n" * 400}, ("tokenizer.vocab_size=200",), "256 bytes and 10 special tokens"),
        ({"a.txt": TEXT}, ("data.max_length=4096",), "the model has 2,048 positions"),
        ({"a.txt": TEXT}, ("data.path=reasoning_gym/chain_sum",), "this recipe needs plain text"),
        ({"a.txt": TEXT}, ("model.name_or_path=smollm2-135m",), "run full_sft"),
        ({"a.txt": TEXT}, ("decay_steps=0.3",), "no effect with lr_scheduler_type=cosine"),
    ],
)
def test_bad_input_is_told_before_a_step_is_made(
    files: dict[str, Any], words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    path = () if any(word.startswith("data.path=") for word in words) else (f"data.path={next(iter(files))}",)
    found = cli("run", "pretrain", "depth=1", "max_steps=1", *path, *words)
    assert found.code in (2, 3)
    assert said in found.err
    assert not (tmp_path / "runs").exists()


def test_held_out_text_that_is_part_of_the_training_text_is_refused_and_a_little_of_it_is_noted(tmp_path: Path) -> None:
    lines = TEXT.splitlines(keepends=True)
    (tmp_path / "all.txt").write_text("".join(lines))
    (tmp_path / "held.txt").write_text("".join(lines[103:203]))  # in other runs of lines than in the whole
    words = [f"data.path={tmp_path / 'all.txt'}", f"data.held_out_path={tmp_path / 'held.txt'}"]
    with pytest.raises(DataError, match="held-out texts stand in the training text, too"):
        prepare("pretrain", tmp_path, *words, "held_out_size=null")
    unseen = "".join(
        f"Nobody ever told the {n}th gull about the {n * n} rocks behind the old light.\n" for n in range(300)
    )
    (tmp_path / "held.txt").write_text(unseen + "".join(lines[103:123]))
    run = prepare("pretrain", tmp_path, *words, "held_out_size=null")
    assert any("stand in the training text, too" in note for note in run.data.ledger.notes)


def test_the_text_in_the_package_has_its_last_tenth_held_out() -> None:
    from finetune_kit.data.ledger import Ledger
    from finetune_kit.data.load import _split

    train_rows, held_out = _split(DataConfig(path="tiny_shakespeare"), "text", 0, Ledger())
    assert [sum(len(row.text) for row in rows) for rows in (train_rows, held_out)] == [1003854, 111540]
    assert len(held_out) >= 20
