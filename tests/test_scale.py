"""docs/scale.md and its files: accelerate takes each of them, and the table's formulae are those of `check`."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from finetune_kit.data.load import load_data
from finetune_kit.models.coverage import layers_of
from finetune_kit.models.shapes import empty_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.planning import devices
from finetune_kit.planning.devices import shares
from finetune_kit.planning.memory import memory
from tests.fixtures_cli import ROOT, cli
from tests.fixtures_training import settings

FILES = {
    "accelerate_config.yaml": ("MULTI_GPU", "multi_gpu"),
    "docs/accelerate/fsdp2.yaml": ("FSDP", "use_fsdp"),
    "docs/accelerate/zero2.yaml": ("DEEPSPEED", "use_deepspeed"),
    "docs/accelerate/zero3.yaml": ("DEEPSPEED", "use_deepspeed"),
    "docs/accelerate/multi_node.yaml": ("MULTI_GPU", "multi_gpu"),
    "docs/accelerate/multi_node_fsdp2.yaml": ("FSDP", "use_fsdp"),
}


def test_every_file_of_the_folder_is_tested_and_named_on_the_page() -> None:
    found = {f"docs/accelerate/{path.name}" for path in (ROOT / "docs" / "accelerate").iterdir()}
    assert found | {"accelerate_config.yaml"} == FILES.keys()
    page = (ROOT / "docs" / "scale.md").read_text()
    assert all(name.removeprefix("docs/") in page for name in FILES)


@pytest.mark.parametrize(("name", "kind"), FILES.items())
def test_accelerate_takes_the_file_and_would_start_what_it_says(name: str, kind: tuple[str, str]) -> None:
    config = load_config_from_file(str(ROOT / name))
    assert config.distributed_type == kind[0]
    arguments = launch_command_parser().parse_args(["--config_file", str(ROOT / name), "train.py"])
    validated = _validate_launch_command(arguments)[0]
    assert getattr(validated, kind[1])
    assert not validated.use_cpu
    if "fsdp2" in name:
        assert validated.fsdp_version == 2
    if "zero" in name:
        assert validated.zero_stage == int(re.sub(r"\D", "", name))


@pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
def test_memory_and_traffic_follow_the_formulae_of_the_page(
    recipe: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(recipe, home, "gradient_accumulation_steps=3")
    data = load_data(config.data, config.kind, load_tokenizer(config.model))
    lora = getattr(config, "lora", None)
    policy = empty_policy(config.model, lora, trained_in_full=lora is None)
    parts = memory(config, data, policy)
    monkeypatch.setattr(devices, "memory", lambda *given: parts)  # a rehearsal differs by some bytes from the next one
    whole, gradients, state = (parts[name] for name in ("weights", "gradients", "optimizer_state"))
    rest = sum(parts.values()) - whole - gradients - state
    ways = {way.sharding: way for way in shares(config, data, policy, 4)}
    blocks = [4 * sum(p.numel() for p in block.parameters() if p.requires_grad) for block in layers_of(policy)]
    assert ways["data parallel"].training == whole + 2 * gradients + state + rest
    assert ways["data parallel"].sent == int(2 * 3 / 4 * gradients)
    assert ways["ZeRO-2"].training == whole + (gradients + state) // 4 + blocks[0] + rest
    assert ways["ZeRO-2"].sent == int(3 / 4 * (3 * gradients + gradients))  # float32: as many bytes as their weights
    size = sum(p.numel() * 4 for p in policy.parameters())
    assert ways["FSDP2"].sent == int(3 / 4 * 3 * (2 * size + gradients))
    assert all(way.bytes >= parts["libraries"] + whole for way in ways.values())


@pytest.mark.long
def test_check_prints_the_ways_for_4_devices_and_the_command_of_the_first_that_fits(home: Path) -> None:
    words = ("full_sft", f"model.name_or_path={home / 'tiny'}", f"data.path={home / 'rows.jsonl'}")
    said = cli("check", *words, "--devices", "4", "--memory", "4GiB")
    assert said.code == 0
    assert "On 4 devices with 4.00 GiB each" in said.out
    assert all(name in said.out for name in ("data parallel", "ZeRO-2", "FSDP2"))
    assert re.search(r"steps +\d+ of 32 rows", said.out)
    launched = "accelerate launch --config_file accelerate_config.yaml --num_processes 4 -m finetune_kit run full_sft"
    assert launched in said.err
    little = cli("check", *words, "--devices", "4", "--memory", "8MiB")
    assert little.code == 5
    assert "None of these ways fits into 8.0 MiB on each of 4 devices." in little.err
