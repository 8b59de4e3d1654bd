"""The embedded default is found, made once, proven by its hashes, and asked for in one command where it is missing."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_kit.errors import ResourceError
from finetune_kit.models import embedded
from finetune_kit.models.embedded import INSTALL, MANIFEST, NAME, cache_folder, embedded_folder, sha256
from finetune_kit.models.source import load_model_config, public_name
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.settings.schema import ModelConfig


def test_without_the_package_the_pip_command_is_named_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError) as caught:
        embedded_folder()
    assert INSTALL in caught.value.fix
    assert "model.name_or_path" in caught.value.fix
    assert not (tmp_path / "cache").exists()


def test_another_file_than_the_one_expected_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "model.gguf").write_bytes(b"another model")

    class Spec:
        submodule_search_locations = (str(tmp_path / "package"),)

    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(ResourceError, match=r"model\.gguf is not the file expected"):
        embedded_folder()


class TestHolds:
    @pytest.fixture
    def whole(self, tmp_path: Path) -> Path:
        for name in ("model.safetensors", "config.json"):
            (tmp_path / name).write_text(name)
        return with_manifest(tmp_path)

    def test_a_folder_of_files_as_they_were_written_holds(self, whole: Path) -> None:
        assert embedded._holds(whole)

    def test_one_changed_byte_is_noticed(self, whole: Path) -> None:
        (whole / "model.safetensors").write_text("model.safetensorz")
        assert not embedded._holds(whole)

    @pytest.mark.parametrize("name", ["model.safetensors", MANIFEST])
    def test_a_missing_file_is_noticed(self, whole: Path, name: str) -> None:
        (whole / name).unlink()
        assert not embedded._holds(whole)

    @pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
    def test_a_broken_manifest_is_noticed(self, whole: Path, content: str) -> None:
        (whole / MANIFEST).write_text(content)
        assert not embedded._holds(whole)


class TestMaking:
    @pytest.fixture
    def conversions(self, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """The tiny model stands for the converted one; each conversion is noted."""
        made: list[Path] = []

        def convert(source: Path, target: Path) -> None:
            shutil.copytree(tiny_model, target)
            made.append(target)

        monkeypatch.setenv("FINETUNE_KIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(embedded, "_source", lambda: Path("model.gguf"))
        monkeypatch.setattr(embedded, "_convert", convert)
        return made

    def test_it_is_made_once_and_left_alone(self, conversions: list[Path], tmp_path: Path) -> None:
        assert embedded_folder() == embedded_folder()
        assert len(conversions) == 1
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [embedded_folder().name]

    def test_each_file_is_hashed_once_a_process_and_again_when_it_has_changed(
        self, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import hashlib

        folder, read = embedded_folder(), []
        real = hashlib.file_digest
        embedded._sha256.cache_clear()
        monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or real(file, kind))
        for _ in range(10):
            embedded_folder()
        files = [path for path in folder.iterdir() if path.name != MANIFEST]
        assert sorted(read) == sorted(map(str, files))
        files[0].touch()
        embedded_folder()
        assert read.count(str(files[0])) == 2

    def test_a_damaged_copy_is_made_anew(self, conversions: list[Path]) -> None:
        weights = embedded_folder() / "model.safetensors"
        right = sha256(weights)
        weights.write_bytes(b"damaged")
        assert sha256(embedded_folder() / "model.safetensors") == right
        assert len(conversions) == 2

    def test_a_conversion_that_fails_leaves_nothing_behind(
        self, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(source: Path, target: Path) -> None:
            target.mkdir()
            (target / "model.safetensors").write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(embedded, "_convert", fail)
        with pytest.raises(ResourceError, match="disk full"):
            embedded_folder()
        assert list((tmp_path / "cache").iterdir()) == []

    def test_where_another_process_was_first_its_whole_copy_is_taken(
        self, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
    ) -> None:
        target = tmp_path / "cache" / f"{NAME}-{embedded.SOURCE_SHA256[:12]}"

        def convert_while_another_does(source: Path, whole: Path) -> None:
            shutil.copytree(tiny_model, whole)
            shutil.copytree(tiny_model, target)
            with_manifest(target)

        monkeypatch.setattr(embedded, "_convert", convert_while_another_does)
        assert embedded_folder() == target


def with_manifest(folder: Path) -> Path:
    hashes = {path.name: sha256(path) for path in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"sha256": hashes}))
    return folder


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("FINETUNE_KIT_CACHE", raising=False)
    assert cache_folder() == Path("/somewhere/finetune_kit")
    monkeypatch.setenv("FINETUNE_KIT_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")


def test_the_real_one_is_smollm2_with_chatml_a_pad_token_of_its_own_and_no_mark_of_quantisation() -> None:
    model = ModelConfig()
    config: Any = load_model_config(model)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert not hasattr(config, "quantization_config")
    tokenizer = load_tokenizer(model)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in rendered
    assert public_name(NAME) == NAME
