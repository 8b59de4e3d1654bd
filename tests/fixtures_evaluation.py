"""A byte-level tokenizer, tiny random models and held-out rows, made in memory in milliseconds."""

from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from finetune_kit.data.records import PromptCompletion

torch.set_num_threads(1)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ChatML, and pad equal to eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_llama(seed: int = 0, dropout: float = 0.0) -> LlamaForCausalLM:
    """2 layers, 32 wide, random weights large enough that no two next tokens are close."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_dropout=dropout,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Learned absolute positions (a shifted position changes every logit) and dropout of 0.1."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def held_out(tokenizer: Any, pairs: list[tuple[str, str]], **changes: Any) -> SimpleNamespace:
    """What `data.load.Data` gives for question and answer pairs, only the answers supervised."""
    records, rows = [], []
    for index, (question, answer) in enumerate(pairs):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append(PromptCompletion(f"held.jsonl:{index + 1}", messages, None, {"answer": answer}))
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        completion = tokenizer(f"{answer}<|im_end|>")["input_ids"]
        labels = [-100] * len(prompt) + completion
        rows.append({"input_ids": prompt + completion, "labels": labels, "row": index})
    data = {
        "kind": "prompt_completion",
        "held_out": rows,
        "held_out_records": records,
        "score": None,
        "end_token_ids": [tokenizer.eos_token_id],
        "chat_template_kwargs": {},
        "special_tokens_in_text": "text",
    }
    return SimpleNamespace(**{**data, **changes})
