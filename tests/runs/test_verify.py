"""What lies in a run's folder is what was trained: bit for bit and by outputs; where nobody knows it is said."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_kit.errors import NumericsError
from finetune_kit.models.load import load_base, load_policy
from finetune_kit.models.precision import as_loaded, plain_forward
from finetune_kit.runs import verify
from finetune_kit.runs.save import Artifact, save, save_weights
from finetune_kit.runs.saved import open_run, verify_run
from finetune_kit.runs.saved_tensors import check_saved_tensors
from finetune_kit.runs.verify import NotMade, Outputs, judged, outputs, prove
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.fixtures_cli import python
from tests.fixtures_gpu import reloading_here
from tests.fixtures_training import Trained, fit_only
from tests.warm import FRESH

PROBE = list(range(5, 45))
KINDS: dict[str, dict[str, Any]] = {
    "adapter": {"r": 4},
    "DoRA": {"r": 4, "use_dora": True},
    "whole modules": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]},
    "all weights, of which two are tied": {"r": 0},
}


@pytest.fixture(scope="module")
def trained(shared_home: Path) -> Trained:
    return fit_only("lora_sft", shared_home, "learning_rate=1e-2", "max_steps=2")


class TestBits:
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_trained_tensor_is_found_and_a_single_flipped_bit_of_any_is_named(
        self, kind: str, tiny_model: Path, tmp_path: Path
    ) -> None:
        model = load_policy(ModelConfig(name_or_path=str(tiny_model)), LoraConfig(**KINDS[kind]))
        model.save_pretrained(tmp_path, **({"save_embedding_layers": False} if KINDS[kind]["r"] else {}))
        count = sum(parameter.requires_grad for parameter in model.parameters())
        assert check_saved_tensors(model, tmp_path) == count
        path = next(path for path in tmp_path.glob("*.safetensors"))
        whole = load_file(path)
        for name in [*whole][:: max(1, len(whole) // 4)]:
            flipped = {key: tensor.clone() for key, tensor in whole.items()}
            flipped[name].view(torch.int32).flatten()[0] ^= 1
            save_file(flipped, path, metadata={"format": "pt"})
            with pytest.raises(NumericsError, match=f"1 differ; {name} is another one"):
                check_saved_tensors(model, tmp_path)
        kept = {key: tensor for key, tensor in whole.items() if key != name}
        save_file(kept, path, metadata={"format": "pt"})
        with pytest.raises(NumericsError, match="is not in it"):
            check_saved_tensors(model, tmp_path)

    def test_a_tensor_of_another_type_is_another_one(self, tiny_model: Path, tmp_path: Path) -> None:
        model = load_base(ModelConfig(name_or_path=str(tiny_model)), trained_in_full=True)
        model.save_pretrained(tmp_path)
        tensors = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / "model.safetensors").items()}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(NumericsError, match="is another one"):
            check_saved_tensors(model, tmp_path)


class TestOutputs:
    def test_in_bfloat16_a_model_without_its_adapter_is_found_out_and_rounding_is_let_pass(
        self, tiny_model: Path
    ) -> None:
        model = load_base(ModelConfig(name_or_path=str(tiny_model), dtype="bfloat16"))
        here = outputs(model, PROBE)
        noise = here.rounding * torch.randn(here.logits.shape, generator=torch.Generator().manual_seed(0))
        assert judged(here, here.logits + noise, Path("run")) > 0
        moved = here.logits + 12 * here.rounding
        with pytest.raises(NumericsError, match="where rounding explains"):
            judged(here, moved, Path("run"))

    def test_a_best_token_that_changes_where_it_leads_by_more_than_rounding_is_an_error(self) -> None:
        logits = torch.tensor([[[4.0, 3.0, 0.0], [1.0, 0.99, 0.0]]])
        here = Outputs(logits, rounding=0.1)
        assert judged(here, logits.flip(-1)[..., [1, 2, 0]] * 0 + logits, Path("run")) == 0
        close = logits.clone()
        close[0, 1] = torch.tensor([0.99, 1.0, 0.0])
        assert judged(here, close, Path("run")) == pytest.approx(0.01)
        far = logits.clone()
        far[0, 0] = torch.tensor([3.4, 3.6, 0.0])
        with pytest.raises(NumericsError, match="the best token is another one at 1 of 1 places"):
            judged(here, far, Path("run"))

    def test_float32_allows_a_ten_thousandth_whatever_the_spread(self) -> None:
        logits = 100 * torch.randn(1, 4, 9)
        assert Outputs(logits, 0.0).tolerance == 1e-4
        with pytest.raises(NumericsError):
            judged(Outputs(logits, 0.0), logits + 2e-4, Path("run"))

    def test_autocast_compiling_and_tf32_are_off_and_come_back(self, tiny_model: Path) -> None:
        model = load_base(ModelConfig(name_or_path=str(tiny_model)))
        plain = outputs(model, PROBE).logits
        torch.set_float32_matmul_precision("high")
        try:
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(outputs(model, PROBE).logits, plain)
                with as_loaded(model):
                    assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision("highest")

    def test_what_accelerate_puts_around_forward_is_taken_away_and_the_models_own_decorators_stay(
        self, tiny_model: Path
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        model = load_base(ModelConfig(name_or_path=str(tiny_model)))
        own = model.forward
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        assert model.forward != own
        plain_forward(model)
        assert model.forward == own
        assert len(model(torch.tensor([PROBE]), return_dict=False)) >= 1


class TestChild:
    @pytest.mark.parametrize(
        ("code", "said", "why"),
        [
            (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "ran out of memory"),
            (1, "MemoryError", "ran out of memory"),
            (-signal.SIGKILL, "", "ended by SIGKILL, as a system does that is short of memory"),
            (-signal.SIGABRT, "what():  std::bad_alloc", "ran out of memory"),
            (-signal.SIGSEGV, "", "ended by SIGSEGV"),
            (1, "ImportError: Using bitsandbytes 4-bit quantization requires bitsandbytes", "lacks a package"),
        ],
    )
    def test_what_ended_it_is_told_as_what_it_is_and_speaks_not_against_the_weights(
        self, code: int, said: str, why: str
    ) -> None:
        failure = verify._failure(code, said, Path("run"))
        assert isinstance(failure, NotMade)
        assert why in failure.message
        assert isinstance(verify._failure(1, "Traceback\nValueError: no such key", Path("run")), NumericsError)

    def test_a_proof_that_cannot_be_made_costs_no_run_and_is_said_with_the_command_that_makes_it(
        self, trained: Trained, lora_run: Artifact, tmp_path: Path, monkeypatch: Any, capsys: Any
    ) -> None:
        monkeypatch.setattr(trained.config.train, "output_dir", str(tmp_path))
        done = (1, "torch.OutOfMemoryError: CUDA out of memory.")
        with monkeypatch.context() as patch:
            patch.setattr(verify, "in_a_fresh_process", lambda *_: done)
            save(trained.model, trained.tokenizer, trained.config, trained.data, lora_run.report, [])
        results = json.loads((tmp_path / "report.json").read_text())
        assert results["reload_max_logit_difference"] is None
        assert "ran out of memory" in results["reload"]["not_made"]
        assert f"python -m finetune_kit verify {tmp_path}" in capsys.readouterr().err
        assert "was not proven: on cpu the fresh process" in (tmp_path / "README.md").read_text()

    def test_verify_makes_it_later_and_puts_it_into_report_and_card(self, lora_run: Artifact, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(lora_run.folder, tmp_path / "run"))
        results = json.loads((folder / "report.json").read_text())
        card = (folder / "README.md").read_text()
        none = {**results, "reload_max_logit_difference": None, "reload": {"not_made": "no memory"}}
        (folder / "report.json").write_text(json.dumps(none))
        (folder / "README.md").write_text(card.replace(verify.sentence(results), verify.sentence(none)))
        with reloading_here([]):
            proof = verify_run(open_run(folder, []))
        assert proof.difference is not None
        assert json.loads((folder / "report.json").read_text())["reload_max_logit_difference"] == proof.difference
        assert "reproduced its outputs to" in (folder / "README.md").read_text()

    def test_weights_that_were_changed_afterwards_are_found_out(self, trained: Trained, tmp_path: Path) -> None:
        save_weights(trained.model, trained.tokenizer, trained.config, [3], tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors[sorted(tensors)[-1]] += 0.5
        save_file(tensors, path, metadata={"format": "pt"})
        with reloading_here([]), pytest.raises(NumericsError, match="its outputs differ by"):
            prove(trained.model, trained.config.model, tmp_path, PROBE)

    def test_where_the_device_has_no_room_for_two_models_both_sides_are_computed_on_the_cpu(
        self, trained: Trained, tmp_path: Path, monkeypatch: Any
    ) -> None:
        save_weights(trained.model, trained.tokenizer, trained.config, [3], tmp_path)
        tried: list[str] = []
        real = verify.reload_logits

        def short_there(config: Any, folder: Path, probe: Any, dtype: Any, device: torch.device, **named: Any) -> Any:
            tried.append(device.type)
            if len(tried) == 1:
                raise NotMade("the fresh process ran out of memory")
            return real(config, folder, probe, dtype, device, **named)

        monkeypatch.setattr(verify, "reload_logits", short_there)
        monkeypatch.setattr(verify, "place", lambda _: "cpu:0")  # a device of another name, as a GPU has
        with reloading_here([]):
            proof = prove(trained.model, trained.config.model, tmp_path, PROBE)
        assert tried == ["cpu", "cpu"]
        assert (proof.device, proof.difference is not None) == ("cpu", True)

    def test_packages_on_pythonpath_are_seen_and_the_working_folder_and_this_package_are_not(
        self, tmp_path: Path, lora_run: Artifact
    ) -> None:
        own, here = tmp_path / "packages", tmp_path / "here"
        own.mkdir()
        here.mkdir()
        (own / "peft.py").write_text("raise ImportError('this peft is on PYTHONPATH alone')")
        (here / "torch.py").write_text("raise SystemExit('the working folder is on the path')")
        script = (
            "import sys; from pathlib import Path; from finetune_kit.runs import verify\nprint(verify.packages())\n"
        )
        said = python("-c", script, cwd=here, PYTHONPATH=os.pathsep.join([str(own), str(here)]))
        assert said.code == 0, said.err
        listed = said.out.split("'")[1::2]
        assert str(own) in listed
        assert str(here) not in listed
        (tmp_path / "own.py").write_text("import finetune_kit")
        given = {"path": listed, "definition": str(tmp_path / "own.py")}
        blocked = python("-I", str(verify.RELOAD), json.dumps(given), cwd=here)
        assert blocked.err.strip().splitlines()[-1].startswith("ModuleNotFoundError: import of finetune_kit halted")

    def test_a_package_that_only_pythonpath_has_reaches_the_fresh_process(
        self, tmp_path: Path, lora_run: Artifact, monkeypatch: Any
    ) -> None:
        (tmp_path / "peft.py").write_text("raise ImportError('found on PYTHONPATH')")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        monkeypatch.setattr(verify, "in_a_fresh_process", FRESH)
        run = open_run(lora_run.folder, [])
        base = str(run.config.model.name_or_path)
        with pytest.raises(NotMade, match=r"lacks a package .*found on PYTHONPATH"):
            verify.reload_logits(run.config.model, run.folder, PROBE, torch.float32, torch.device("cpu"), base=base)
