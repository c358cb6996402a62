"""A real CLIP tokenizer for the world: each of its words is one token, anything else falls back to bytes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from dreambooth_lab.toybox.captions import words

MAX_LENGTH = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE, in byte order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(spare)) for b in range(256)]


def segment(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """What byte-pair encoding with these merges makes of a word."""
    parts = [*word[:-1], word[-1] + END]
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        parts[at : at + 2] = ["".join(best)]
    return parts


def merges_for(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Merges after which every word is one token. New merges rank last, so they can't undo an earlier word."""
    ranks: dict[tuple[str, str], int] = {}
    for word in vocabulary:
        parts = segment(word, ranks)
        while len(parts) > 1:
            ranks.setdefault((parts[0], parts[1]), len(ranks))
            parts = segment(word, ranks)
    return list(ranks)


def build_tokenizer() -> CLIPTokenizer:
    merges = merges_for(words())
    alphabet = byte_alphabet()
    symbols = [*alphabet, *(a + END for a in alphabet), *(a + b for a, b in merges), BOS, EOS]
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    pairs: Any = merges  # typed as strings upstream, which it doesn't take
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_LENGTH, **special)


def save_tokenizer(folder: Path) -> None:
    build_tokenizer().save_pretrained(folder)
