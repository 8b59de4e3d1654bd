"""answering.py: a run is asked with the tokens of its training, and answers as in its evaluation and in plain PEFT."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_kit.cli import main
from finetune_kit.data.load import load_data
from finetune_kit.data.records import prompt_of
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.runs import answering
from finetune_kit.runs.answering import (
    Decoding,
    LoadedRun,
    answer_fields,
    answer_one,
    answer_prompt_file,
    answers,
    check,
    converse,
    load,
    prepare,
    prompt_ids,
)
from finetune_kit.runs.save import Artifact
from finetune_kit.runs.saved import FinishedRun, open_run, tokenizer_of
from finetune_kit.tools.load import load_tools
from tests.fixtures_data import write_jsonl

SHORT = Decoding(max_new_tokens=8)
QUESTION = [{"role": "user", "content": "is 41 a number?"}]

# In a fresh process: what plain transformers and PEFT make of the folder, with its own tokenizer, template and ends.
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, kind, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
if kind == "adapter":
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": question}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.inference_mode():
    logits = model(**ids).logits[0, -1].float()
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1]:]
assert "finetune_kit" not in sys.modules
text = tokenizer.decode(answer, skip_special_tokens=True)
print(json.dumps({"ids": ids["input_ids"][0].tolist(), "logits": logits.tolist(), "text": text}))
"""


@pytest.fixture(scope="module")
def lora(lora_run: Artifact) -> LoadedRun:
    """The LoRA run, ready to answer greedily in 8 tokens, with its base beside it."""
    return load(prepare(open_run(lora_run.folder, []), SHORT), with_base=True)


@pytest.fixture(scope="module")
def full(full_run: Artifact) -> LoadedRun:
    """The same of the run that trained all weights to say "yes"."""
    return load(prepare(open_run(full_run.folder, []), SHORT), with_base=True)


def with_settings(run: FinishedRun, **data: Any) -> FinishedRun:
    """The run as if it had been trained with these data settings."""
    changed = open_run(run.folder, [])
    for name, value in data.items():
        setattr(changed.config.data, name, value)
    return changed


def said_in(asked: LoadedRun, turns: list[str]) -> tuple[str, list[int]]:
    """What a conversation prints, and the lengths of the prompts that the model was given."""
    shown: list[str] = []
    lengths: list[int] = []
    hook = asked.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: lengths.append(inputs[0].shape[1]) if inputs[0].shape[1] > 1 else None
    )

    def read() -> str:
        if not turns:
            raise EOFError
        return turns.pop(0)

    try:
        converse(asked, read, shown.append)
    finally:
        hook.remove()
    return "".join(shown), lengths


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"system_prompt": "Be brief."},
        {"apply_chat_template": False},
        {"chat_template_kwargs": {"tools_heading": "x"}},
    ],
    ids=["as trained", "a system prompt", "bare prompts", "template arguments"],
)
def test_the_tokens_of_a_prompt_are_those_before_the_answer_in_training(
    lora_run: Artifact, settings: dict[str, Any]
) -> None:
    run = with_settings(open_run(lora_run.folder, []), **settings)
    asked = prepare(run, SHORT)
    data = load_data(run.config.data, "prompt_completion", tokenizer_of(run), seed=run.config.train.seed)
    own = run.config.data.system_prompt
    for row, record in zip(data.held_out, data.held_out_records, strict=True):
        turns = [{"role": "user", "content": prompt_of(record)[-1]["content"]}]
        before = row["labels"].index(next(label for label in row["labels"] if label != -100))
        assert prompt_ids(asked, turns) == row["input_ids"][:before]
        if own:
            other = prepare(run, SHORT, system="")
            assert prompt_ids(other, turns) != row["input_ids"][:before]
    assert asked.end_token_ids == data.end_token_ids


@pytest.mark.parametrize("which", ["lora", "full"])
def test_both_sides_answer_as_they_did_in_the_runs_own_evaluation(which: str, request: pytest.FixtureRequest) -> None:
    asked: LoadedRun = request.getfixturevalue(which)
    report = json.loads((asked.run.folder / "report.json").read_text())
    decoding = Decoding(max_new_tokens=report["decoding"]["max_new_tokens"])
    asked = LoadedRun(**{**vars(asked), "decoding": decoding})
    prompts = [prompt_ids(asked, [{"role": "user", "content": sample["prompt"]}]) for sample in report["samples"]]
    fields = answer_fields(asked, prompts)
    for sample, answer in zip(report["samples"], fields, strict=True):
        assert [answer["base_completion"], answer["completion"]] == [sample["before"], sample["after"]]
        assert [answer["base_ended"], answer["ended"]] == sample["ended"]
    assert any(answer["base_completion"] != answer["completion"] for answer in fields)


@pytest.mark.parametrize("which", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_plain_transformers_and_peft_in_a_fresh_process_have_the_same_tokens_logits_and_answer(
    which: str, request: pytest.FixtureRequest
) -> None:
    import torch

    asked: LoadedRun = request.getfixturevalue(which)
    folder = asked.run.folder
    kind = "adapter" if which == "lora" else "model"
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(folder.resolve()), kind, QUESTION[0]["content"]],
        cwd=folder.parent,  # the base lies there under the name that the adapter knows it by
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout)
    assert plain["ids"] == prompt_ids(asked, QUESTION)
    with torch.no_grad():
        logits = asked.model(input_ids=torch.tensor([plain["ids"]])).logits[0, -1].float()
    assert float((logits - torch.tensor(plain["logits"])).abs().max()) <= 1e-4
    assert plain["text"] == answers(asked, [plain["ids"]])[0].text


def test_a_prompt_file_is_answered_as_one_by_one_and_resumed_where_it_was_cut(full: LoadedRun, tmp_path: Path) -> None:
    rows = [{"prompt": f"is {n} a number" + "?" * (n % 7), "n": n} for n in range(5)]
    prompts = Path(write_jsonl(tmp_path / "prompts.jsonl", rows))
    output, told = tmp_path / "out.jsonl", []
    settings: dict[str, Any] = {"batch_size": 2, "with_base": True}
    counts = answer_prompt_file(full, prompts, output, **settings, progress=lambda *told_now: told.append(told_now))
    assert counts == (5, 0)
    assert told == [("prompts", 0, 5), ("prompts", 2, 5), ("prompts", 4, 5), ("prompts", 5, 5)]
    content = output.read_bytes()
    for row, line in zip(rows, map(json.loads, content.splitlines()), strict=True):
        ids = prompt_ids(full, [{"role": "user", "content": row["prompt"]}])
        alone, base = answers(full, [ids])[0], answers(full, [ids], of_base=True)[0]
        assert {name: line[name] for name in row} == row
        assert (line["completion"], line["ended"], line["tokens"]) == (alone.text, alone.ended, len(alone.ids))
        assert (line["base_completion"], line["base_tokens"]) == (base.text, len(base.ids))
    output.write_bytes(content[: len(content) // 2])
    assert answer_prompt_file(full, prompts, output, **settings) == (5, 2)
    assert output.read_bytes() == content
    assert answer_prompt_file(full, prompts, output, **settings) == (5, 5)
    with pytest.raises(DataError, match="other settings"):
        answer_prompt_file(full, prompts, output, batch_size=2)


def test_samples_of_a_seed_are_the_same_after_a_cut_and_equal_prompts_have_different_noise(
    lora: LoadedRun, tmp_path: Path
) -> None:
    prompts = Path(write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "1 + 1 ="}] * 5))
    output = tmp_path / "out.jsonl"
    sampled = LoadedRun(**{**vars(lora), "decoding": Decoding(max_new_tokens=8, temperature=1.5, seed=3)})
    answer_prompt_file(sampled, prompts, output, batch_size=2)
    content = output.read_bytes()
    assert len({json.loads(line)["completion"] for line in content.splitlines()}) == 5
    output.write_bytes(content[: 3 * len(content) // 4])
    answer_prompt_file(sampled, prompts, output, batch_size=2)
    assert output.read_bytes() == content
    with pytest.raises(DataError, match="other settings"):
        answer_prompt_file(sampled, prompts, output, batch_size=3)


def test_prompts_that_cannot_be_asked_are_named_by_line_before_anything_is_written(
    lora_run: Artifact, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    prompts = Path(write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "long " * 1000}]))
    asked = prepare(open_run(lora_run.folder, []), SHORT)
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: 50\d\d tokens of prompt and 8 to come.* 4096"):
        answer_prompt_file(asked, prompts, output)
    turns = [{"role": "user", "content": text} for text in ("a", "b")]
    write_jsonl(prompts, [{"prompt": "a"}, {"messages": turns}])
    bare = prepare(with_settings(asked.run, apply_chat_template=False), SHORT)
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: This run was trained on bare prompts"):
        answer_prompt_file(bare, prompts, output)
    with pytest.raises(SettingsError, match="--batch-size 0"):
        answer_prompt_file(asked, prompts, output, batch_size=0)
    assert not output.exists()


def test_a_system_turn_for_a_run_of_bare_prompts_is_refused(lora_run: Artifact) -> None:
    with pytest.raises(SettingsError, match="--system has no effect"):
        prepare(with_settings(open_run(lora_run.folder, []), apply_chat_template=False), SHORT, system="Be brief.")


def test_each_turn_of_a_conversation_is_given_the_whole_of_it_and_reset_begins_anew(full: LoadedRun) -> None:
    first = {"role": "user", "content": "is 3 a number?"}
    reply = {"role": "assistant", "content": answers(full, [prompt_ids(full, [first])])[0].text}
    alone = len(prompt_ids(full, [first]))
    both = len(prompt_ids(full, [first, reply, first]))
    full = LoadedRun(**{**vars(full), "base": None})
    shown, lengths = said_in(full, [first["content"], "", first["content"], "/reset", first["content"], "/exit", "no"])
    assert lengths == [alone, both, alone]
    assert shown.count("yes") >= 2
    assert reply["content"] == "yes"


def test_a_run_of_bare_prompts_is_given_each_turn_alone_and_says_so(full: LoadedRun) -> None:
    run = with_settings(full.run, apply_chat_template=False)
    bare = LoadedRun(**{**vars(full), "run": run, "base": None})
    shown, lengths = said_in(bare, ["abc", "defgh"])
    assert lengths == [3, 5]
    assert "Each prompt stands alone" in shown


def test_a_conversation_with_the_base_shows_both_and_one_that_is_too_long_is_said_and_left_out(lora: LoadedRun) -> None:
    narrow = LoadedRun(**{**vars(lora), "positions": len(prompt_ids(lora, QUESTION)) + 8})
    shown, lengths = said_in(narrow, [QUESTION[0]["content"], "and this?", "/reset", QUESTION[0]["content"]])
    assert shown.count("base:  ") == shown.count("tuned: ") == 2
    assert "the model has positions for" in shown
    assert len(lengths) == 4  # two turns, two models
    assert len(set(lengths)) == 1


@pytest.mark.parametrize("word", ["/exit", "/quit", "quit", "exit", " /QUIT ", "/bye"])
def test_words_that_end_or_explain_are_not_sent_to_the_model(full: LoadedRun, word: str) -> None:
    shown, lengths = said_in(full, ["/help", "help", "/halp", word, "never asked"])
    assert lengths == []
    assert shown.count("/reset starts over") == 4  # at the start, and for each that asks
    assert "/halp is not a command." in shown


def test_ctrl_c_stops_an_answer_and_forgets_its_turn(full: LoadedRun) -> None:
    alone = len(prompt_ids(full, QUESTION))
    shown: list[str] = []
    turns = [QUESTION[0]["content"], QUESTION[0]["content"]]
    lengths: list[int] = []

    def read() -> str:
        if not turns:
            raise KeyboardInterrupt  # at the prompt it ends the conversation
        return turns.pop(0)

    def tell(text: str) -> None:
        shown.append(text)
        if text.startswith("y") and len(turns) == 1:
            raise KeyboardInterrupt

    hook = full.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: lengths.append(inputs[0].shape[1]) if inputs[0].shape[1] > 1 else None
    )
    converse(LoadedRun(**{**vars(full), "base": None}), read, tell)
    hook.remove()
    assert "forgotten" in "".join(shown)
    assert lengths == [alone, alone]


def test_one_answer_is_told_as_it_comes(lora: LoadedRun) -> None:
    pieces: list[str] = []
    completion = answer_one(LoadedRun(**{**vars(lora), "base": None}), QUESTION, pieces.append)
    assert "".join(pieces) == completion.text
    assert completion == answers(lora, [prompt_ids(lora, QUESTION)])[0]


@pytest.mark.parametrize(
    ("decoding", "samples"),
    [
        (Decoding(), False),
        (Decoding(temperature=0.0), False),
        (Decoding(repetition_penalty=1.3, stop=("x",)), False),
        (Decoding(temperature=0.7), True),
        (Decoding(top_p=0.9), True),
        (Decoding(top_k=5), True),
        (Decoding(min_p=0.1), True),
        (Decoding(min_p=0.1, temperature=2.0, seed=1), True),
    ],
)
def test_any_sampling_setting_turns_sampling_on_and_temperature_0_is_greedy(decoding: Decoding, samples: bool) -> None:
    check(decoding)
    arguments = decoding.arguments(shift=2)
    assert decoding.samples == samples == arguments.get("do_sample", False)
    assert arguments.get("seed") == ((decoding.seed or 0) + 2 if samples else None)
    for name in ("temperature", "top_p", "top_k", "min_p"):
        assert arguments.get(name) == (getattr(decoding, name) if samples else None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0: expected 1 or more"),
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"top_p": 0.0}, "--top-p 0: expected above 0 and at most 1"),
        ({"top_p": 1.1}, r"--top-p 1\.1"),
        ({"top_k": -1}, "--top-k -1"),
        ({"min_p": 1.5}, r"--min-p 1\.5: expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0: expected above 0"),
        ({"seed": -1, "temperature": 1.0}, "--seed -1"),
        ({"stop": ("a", "")}, "--stop ''"),
        ({"seed": 1}, "--seed has no effect on greedy answers"),
        ({"temperature": 0.0, "top_p": 0.5}, "--top-p has no effect"),
        ({"temperature": 0.0, "min_p": 0.5}, "--min-p has no effect"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check(Decoding(**settings))


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of a command of ours in this process; `given` is its stdin."""

    def run(*words: str, given: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["finetune_kit", *words])
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def test_the_command_answers_a_prompt_from_its_words_or_from_stdin_and_stops_before_a_string(
    full_run: Artifact, kit: Callable[..., tuple[int, str, str]]
) -> None:
    folder, question = str(full_run.folder), QUESTION[0]["content"]
    assert kit("generate", folder, question)[:2] == (0, "yes\n")
    assert kit("generate", folder, given=question + "\n")[:2] == (0, "yes\n")
    assert kit("generate", folder, question, "--stop", "q", "--stop", "e")[:2] == (0, "y\n")
    code, printed, said = kit("generate", folder, question, "--max-new-tokens", "2")
    assert (code, printed) == (0, "ye\n")
    assert "cut off after 2 tokens" in said


def test_the_command_answers_a_file_and_says_what_was_there(
    full_run: Artifact, kit: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"is {n} a number?"} for n in range(3)])
    words = ["generate", str(full_run.folder), "--prompts", prompts, "--output", str(tmp_path / "out.jsonl")]
    assert kit(*words)[:2] == (0, f"3 answers in {tmp_path}/out.jsonl.\n")
    assert kit(*words)[:2] == (0, f"3 answers in {tmp_path}/out.jsonl, 3 of them from before.\n")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in lines] == ["yes"] * 3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prompts", "p.jsonl"], 2, "--prompts and --output belong together"),
        (["--output", "o.jsonl"], 2, "--prompts and --output belong together"),
        (["hi", "--prompts", "p.jsonl", "--output", "o.jsonl"], 2, "A prompt and --prompts are both given"),
        (["hi", "--batch-size", "4"], 2, "--batch-size has no effect without --prompts"),
        (["--prompts", "p.jsonl", "--output", "o.jsonl"], 2, "--prompts p.jsonl: no such file"),
        (["hi", "--top-p", "7"], 2, "--top-p 7: expected above 0 and at most 1"),
        (["hi", "--max-new-tokens", "5000"], 3, "the model has positions for 4096"),
        ([""], 2, "The prompt is empty"),
        ([], 2, "The prompt is empty"),
    ],
)
def test_what_the_command_refuses(
    lora_run: Artifact,
    kit: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, printed, said = kit("generate", str(lora_run.folder), *words)
    assert (found, printed) == (code, "")
    assert message in said
    assert len(said.splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_on_a_terminal_without_a_prompt_it_converses_until_exit(full_run: Artifact) -> None:
    terminal, far_end = pty.openpty()
    command = [sys.executable, "-m", "finetune_kit", "generate", str(full_run.folder)]
    process = subprocess.Popen(command, stdin=far_end, stdout=far_end, stderr=subprocess.DEVNULL)
    os.close(far_end)
    os.write(terminal, b"is 3 a number?\n/exit\n")
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # how Linux says that the far end is closed
        pass
    assert process.wait(timeout=60) == 0
    os.close(terminal)
    assert b"/reset starts over" in shown
    assert b"\nyes\r\n" in shown


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call><|im_end|>'


def scripted(monkeypatch: pytest.MonkeyPatch, asked: LoadedRun, *turns: str) -> None:
    """Let the model write these turns."""
    left = [token for turn in turns for token in asked.tokenizer(turn, add_special_tokens=False)["input_ids"]]
    monkeypatch.setattr(answering, "greedy", lambda logits, rows: [left.pop(0) for _ in rows])


def with_tools(run: FinishedRun, *tools: str, **more: Any) -> LoadedRun:
    box = Toolbox(load_tools(tools), **more)
    return load(prepare(run, Decoding(max_new_tokens=300), toolbox=box))


def test_a_conversation_shows_each_call_with_its_result_and_keeps_both(
    lora_run: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = with_tools(open_run(lora_run.folder, []), "calculator")
    scripted(monkeypatch, asked, CALL, "It is 42.<|im_end|>", "Yes, 42.<|im_end|>")
    said, lengths = said_in(asked, ["six times seven?", "sure?"])
    assert '[calculator({"expression": "6*7"}) → 42]\n' in said
    assert "It is 42.\n" in said
    assert "Yes, 42.\n" in said
    first, _, second = [length for length in lengths if length > 1]
    turns = [{"role": "user", "content": "six times seven?"}]
    assert first == len(prompt_ids(asked, turns))
    assert second > first + len(asked.tokenizer(CALL)["input_ids"])


def test_a_tool_of_one_s_own_is_asked_for_and_what_is_refused_is_told_the_model(
    lora_run: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        'def lookup(word: str) -> str:\n    """\n    Look up.\n\n    Args:\n        word: It\n    """\n'
        "    return word * 2\n"
    )
    questions: list[tuple[str, dict[str, Any]]] = []

    def allow(tool: Any, arguments: dict[str, Any]) -> bool:
        questions.append((tool.name, arguments))
        return len(questions) > 1

    asked = with_tools(open_run(lora_run.folder, []), f"{tmp_path / 'mine.py'}:lookup", allow=allow)
    call = CALL.replace("calculator", "lookup").replace("expression", "word")
    scripted(monkeypatch, asked, call, call, "Done.<|im_end|>")
    told: list[str] = []
    answer = answer_one(asked, QUESTION, told.append)
    assert [made.result for made in answer.calls] == ["Error: the user does not allow this call", "6*76*7"]
    assert questions == [("lookup", {"word": "6*7"})] * 2
    assert '[lookup({"word": "6*7"}) → 6*76*7]' in "".join(told)


def test_a_file_of_prompts_is_answered_with_tools_and_has_their_calls(
    lora_run: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = with_tools(open_run(lora_run.folder, []), "calculator")
    path, output = Path(write_jsonl(tmp_path / "in.jsonl", [{"prompt": "6 * 7?"}, {"prompt": "Hi"}])), tmp_path / "out"
    scripted(monkeypatch, asked, CALL, "It is 42.<|im_end|>", "Hello.<|im_end|>")
    assert answer_prompt_file(asked, path, output, batch_size=1) == (2, 0)
    first, second = [json.loads(line) for line in output.read_text().splitlines()]
    call = {"name": "calculator", "arguments": {"expression": "6*7"}, "result": "42", "valid": True, "ok": True}
    assert (first["completion"], first["calls"], second["completion"], second["calls"]) == (
        "It is 42.",
        [call],
        "Hello.",
        [],
    )
    assert answer_prompt_file(asked, path, output, batch_size=1) == (2, 2)  # nothing is answered again
    without = load(prepare(open_run(lora_run.folder, []), Decoding(max_new_tokens=300)))
    with pytest.raises(DataError, match="answered by another model, or with other settings"):
        answer_prompt_file(without, path, output, batch_size=1)


def test_a_run_of_bare_prompts_takes_no_tools(lora_run: Artifact) -> None:
    bare = with_settings(open_run(lora_run.folder, []), apply_chat_template=False)
    with pytest.raises(SettingsError, match="trained on bare prompts"):
        prepare(bare, SHORT, toolbox=Toolbox(load_tools(["calculator"])))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["q", "--max-tool-calls", "2"], "--max-tool-calls has no effect without --tools"),
        (["q", "--yes"], "--yes has no effect without --tools"),
        (["q", "--tools", "mine.py:lookup"], "nobody here to ask"),
        (["--prompts", "a", "--output", "b", "--tools", "mine.py:lookup"], "a file of prompts is not interrupted"),
        (["q", "--tools", "calculator", "--tool-timeout", "0"], "expected numbers above 0"),
    ],
)
def test_options_of_tools_that_cannot_act_are_refused(
    lora_run: Artifact, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune_kit", "generate", str(lora_run.folder), *words])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
