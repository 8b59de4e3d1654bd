# %% [markdown]
# # Lesson 4: A tokenizer. Byte-pair encoding by hand
#
# **You need** Python's dictionaries. **You get** the tokenizer of GPT-2, Llama 3 and most others, trained by your own
# code, with the very ids that the library `tokenizers` gives.
#
# A model reads numbers. What should get a number? Characters are many (Unicode has 150,000) and short. Words are
# far too many, and there is always a new one. *Byte-pair encoding* (BPE) finds a middle: start with the 256 bytes,
# which can write any text, and again and again join the pair of neighbours that occurs most often into one new
# token. Frequent words become one token, rare ones a few, and nothing is ever unknown.

# %%
import time
from collections import Counter, defaultdict
from itertools import pairwise

import regex
from lesson import choose, plot, shakespeare, try_exercise

train, held_out = shakespeare()
train, held_out = train[: choose(len(train), 60_000)], held_out[: choose(len(held_out), 20_000)]
VOCABULARY = choose(1024, 400)

# %% [markdown]
# ## Bytes
#
# UTF-8 writes a text as bytes: one for an English letter, up to four for others.

# %%
print({text: list(text.encode("utf-8")) for text in ("a", "é", "語", "🙂")})
assert [len(text.encode("utf-8")) for text in ("a", "é", "語", "🙂")] == [1, 2, 3, 4]

# %% [markdown]
# GPT-2 shows each byte as a printable character, so that a token can be written into a file: the printable ones as
# themselves, the others moved to 256 and above. That is where the famous `Ġ` comes from: it is the space.


# %%
def byte_characters() -> dict[int, str]:
    """{byte: the character it is shown as}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shown = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in shown:
            shown[byte] = chr(256 + len(shown) - len(printable))
    return shown


SHOWN = byte_characters()
BYTE = {character: byte for byte, character in SHOWN.items()}
assert SHOWN[ord(" ")] == "Ġ"
assert len(BYTE) == 256

# %% [markdown]
# ## Cut into pieces first
#
# Tokens must not run across words: "dog." and "dog!" should share "dog". So the text is first cut by a pattern: a
# word with the space before it, a number, a run of signs, white space. Pairs are only joined inside a piece.

# %%
PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
print(PIECES.findall("Speak, speak: it's 5 o'clock"))
assert "".join(PIECES.findall(held_out)) == held_out  # nothing is lost


def as_characters(piece: str) -> tuple[str, ...]:
    return tuple(SHOWN[byte] for byte in piece.encode("utf-8"))


# %% [markdown]
# ## Training: join the most frequent pair, again and again
#
# Ties are broken as the library does it, by the smaller ids, since otherwise the ids would differ. Counting all
# pairs anew after each merge would take minutes, so we remember in which words a pair occurs and count only those
# again.


# %%
def train_bpe(text: str, vocabulary: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """({token: id}, merges in order)."""
    ids = {character: number for number, character in enumerate(sorted(BYTE))}
    words = Counter(PIECES.findall(text))
    spelled = {word: as_characters(word) for word in words}
    counts: Counter[tuple[str, str]] = Counter()
    where = defaultdict(set)

    def book(word: str, sign: int) -> None:
        for pair in pairwise(spelled[word]):
            counts[pair] += sign * words[word]
            where[pair].add(word)

    for word in words:
        book(word, 1)
    merges = []
    while len(ids) < vocabulary:
        pair = max(counts, key=lambda pair: (counts[pair], -ids[pair[0]], -ids[pair[1]]))
        merges.append(pair)
        ids.setdefault(pair[0] + pair[1], len(ids))
        for word in list(where.pop(pair)):
            book(word, -1)
            spelled[word] = join(spelled[word], pair)
            book(word, 1)
        del counts[pair]
    return ids, merges


def join(tokens: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The pair as one token wherever it stands, from left to right."""
    joined, at = [], 0
    while at < len(tokens):
        if tokens[at : at + 2] == pair:
            joined.append(pair[0] + pair[1])
            at += 2
        else:
            joined.append(tokens[at])
            at += 1
    return tuple(joined)


begin = time.perf_counter()
ids, merges = train_bpe(train, VOCABULARY)
print(f"{len(merges)} merges in {time.perf_counter() - begin:.1f} s; the first ten:", *map("".join, merges[:10]))
assert "Ġthe" in ids

# %% [markdown]
# ## Encoding and decoding
#
# A new text is cut, spelled in bytes, and the merges are applied in the order in which they were learned: always the
# earliest that fits. Decoding just puts the bytes together. Any text comes back, bit for bit.

# %%
RANK = {pair: rank for rank, pair in enumerate(merges)}
TOKEN = {number: token for token, number in ids.items()}


def encode(text: str) -> list[int]:
    found = []
    for piece in PIECES.findall(text):
        tokens = as_characters(piece)
        while len(tokens) > 1:
            pair = min(pairwise(tokens), key=lambda pair: RANK.get(pair, len(RANK)))
            if pair not in RANK:
                break
            tokens = join(tokens, pair)
        found += [ids[token] for token in tokens]
    return found


def decode(numbers: list[int]) -> str:
    return bytes(BYTE[character] for number in numbers for character in TOKEN[number]).decode("utf-8")


line = "Speak, speak: the naïve 語 costs 12 🙂"
print([decode([number]) for number in encode("First Citizen: We are accounted poor citizens")])
assert decode(encode(line)) == line
assert decode(encode(held_out)) == held_out

# %% [markdown]
# ## The same ids as `tokenizers`
#
# Now the library, which does the same in Rust. Every merge, every id, on text that was not trained on, and on
# characters that Shakespeare never saw:

# %%
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

library = Tokenizer(models.BPE())
library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
library.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
)
library.train_from_iterator([train], trainer)
assert library.get_vocab() == ids
for text in (held_out, line, "  two  spaces\n\n\tand a tab ", "don't", "١٢٣ ½ e\u0301"):
    assert library.encode(text).ids == encode(text), text
print(f"{len(ids)} tokens and the ids of {len(held_out):,} held-out characters: all equal")

# %% [markdown]
# ## What a larger vocabulary buys
#
# Fewer tokens for the same text, 2.26 bytes in each with 1,024 of them: the model takes fewer steps and looks
# further back with the same number of tokens. The price is a larger table of vectors, and rarer tokens, each seen
# less often in training.

# %%
sizes, per_token = [256], [1.0]
for size in [size for size in (300, 400, 512, 1024) if size <= VOCABULARY]:
    RANK = {pair: rank for rank, pair in enumerate(merges[: size - 256])}
    sizes.append(size)
    per_token.append(len(held_out.encode()) / len(encode(held_out)))
print("bytes a token:", {size: round(number, 2) for size, number in zip(sizes, per_token, strict=True)})
assert per_token == sorted(per_token)
assert abs(per_token[-1] - choose(2.26, 1.66)) < 0.01


def draw(axes) -> None:
    axes.plot(sizes, per_token, "o-")
    axes.set(xlabel="vocabulary", ylabel="bytes a token", title="Held-out Shakespeare", xscale="log")


plot("04_tokenizer", draw)

# %% [markdown]
# A consequence: *loss per token* cannot be compared between tokenizers, since a longer token is harder to guess.
# Loss per **byte** can: sum the nats of all tokens, divide by the bytes of the text and by $\ln 2$. That is *bits
# per byte*.
#
# **For real:** this package takes the tokenizer of the model, always: a model can only read the ids that it was
# trained with. Text becomes ids in `finetune_kit.data.token_ids.text_ids`; a byte-level tokenizer with no merges at all
# is built in `finetune_kit.models.tiny.write_tiny_model`. Any recipe shows how many tokens your rows have before it
# trains: `python -m finetune_kit check lora_sft` (`recipes/lora_sft.py`).
#
# ## Exercise
#
# Write bits per byte. `exercise(nats, text)` gets the loss of each token of a text, in nats, and the text. Mind
# that a text of 語 has three times as many bytes as characters.


# %%
def exercise(nats: list[float], text: str) -> float:
    raise NotImplementedError("bits per byte")


def check(exercise) -> None:
    import math

    assert abs(exercise([math.log(2)] * 8, "abcdefgh") - 1) < 1e-12
    assert abs(exercise([math.log(256)] * 3, "語") - 8) < 1e-12  # not knowing anything costs 8 bits a byte
    assert abs(exercise([math.log(256)], "語") - 8 / 3) < 1e-12


try_exercise(check, exercise)
