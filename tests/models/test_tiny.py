"""The tiny model is a whole one: it loads, its template renders, every byte has a token."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_kit.models.tiny import write_tiny_model


def test_it_is_made_of_2_layers_261_words_and_90752_parameters(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == 261
    assert sum(p.numel() for p in model.parameters()) == 90752


def test_any_text_survives_its_tokenizer(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for text in ("plain", "two  spaces\n", "Grüße, 你好 🙂", "\t{}[]"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_its_template_is_chatml_and_its_pad_token_ends_nothing(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token not in (tokenizer.eos_token, tokenizer.unk_token)


def test_the_seed_decides_the_weights_and_the_random_state_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, again, other = (write_tiny_model(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert torch.rand(1) == expected
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
