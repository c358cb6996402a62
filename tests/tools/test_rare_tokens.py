"""Rare tokens are single tokens of every encoder and unknown words, sorted by isolation."""

from __future__ import annotations

import csv
import gzip
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

from dreambooth_lab import sheet
from dreambooth_lab.tools import rare_tokens
from dreambooth_lab.tools.rare_words import vocabulary
from dreambooth_lab.toybox import tokenizer as toybox


def build(folder, words, monkeypatch):
    monkeypatch.setattr(toybox, "words", lambda: list(words))
    toybox.save_tokenizer(folder)


def run_tool(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        rare_tokens.main([str(word) for word in words])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Two encoders: one word is two tokens of the second, and two embeddings are nearly equal."""
    build(tmp_path / "tokenizer", ["dog", "emma", "def", "qvz", "zwx", "bnha", "xjy", "sks", "longish"], monkeypatch)
    build(tmp_path / "tokenizer_2", ["dog", "emma", "def", "qvz", "zwx", "xjy", "sks", "longish"], monkeypatch)
    for end in ("", "_2"):
        size = len(vocabulary.load(str(tmp_path))[bool(end)].tokenizer)
        rows = torch.randn(size, 64, generator=torch.Generator().manual_seed(0))
        (reader,) = [one for one in vocabulary.load(str(tmp_path)) if one.name == f"tokenizer{end}"]
        ids = {word: reader.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("qvz", "dog")}
        rows[ids["qvz"]] = rows[ids["dog"]] + 0.01
        (tmp_path / f"text_encoder{end}").mkdir()
        save_file({"text_model.embeddings.token_embedding.weight": rows}, tmp_path / f"text_encoder{end}" / "model.safetensors")
    return tmp_path


def test_candidates_are_single_tokens_and_known_words_are_excluded_with_a_reason(model, capsys):
    code, out, _ = run_tool(capsys, "--tokenizer", model)
    assert code == 0
    listed = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert set(listed) == {"qvz", "zwx", "xjy"}, "bnha is several tokens to the second; longish is too long"
    assert listed[-1] == "qvz", "its embedding is close to dog's"
    reasons = {line.partition(":")[0]: line.partition(":")[2] for line in out.splitlines() if line.startswith("left out")}
    assert "dog" in reasons["left out, a word"] and "emma" in reasons["left out, a name"]
    assert "def" in reasons["left out, a word of code"] and "sks" in reasons["left out, a thing that models draw"]
    assert reasons["left out, one token for tokenizer only"].strip() == "bnha"


def test_isolation_is_the_distance_to_the_nearest_other_embedding():
    rows = torch.randn(700, 16, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(600)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    cosines.fill_diagonal_(-2)
    torch.testing.assert_close(vocabulary.isolation(rows, ids), 1 - cosines.amax(1)[:600], atol=1e-5, rtol=1e-5)


def test_word_file_excludes_more_candidates(model, capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("ZWX other\n")
    _, out, _ = run_tool(capsys, "--tokenizer", model, "--words", tmp_path / "mine.txt")
    assert "│ zwx" not in out and "mine.txt: zwx" in out.replace("\n", " ")


def test_audit_counts_the_tokens_of_each_encoder(model, capsys):
    _, out, _ = run_tool(capsys, "--tokenizer", model, "--audit", "bnha dog")
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]] for line in out.splitlines() if "│" in line
    }
    assert [cell.partition(":")[0] for cell in rows["dog"]] == ["1", "1"]
    first, second = (int(cell.partition(":")[0]) for cell in rows["bnha"])
    assert first == 1 and second > 1


def test_toybox_is_the_default_and_its_unused_words_are_found(capsys):
    code, out, _ = run_tool(capsys, "--count", "500")
    assert code == 0 and "│ zwx" in out and "│ ohwx" in out and "│ cat" not in out


def test_folder_without_tokenizer_is_refused(tmp_path, capsys):
    code, _, err = run_tool(capsys, "--tokenizer", tmp_path)
    assert code == 2 and "--tokenizer" in err and str(tmp_path) in err


LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = [("z", "w"), ("zw", "x")]  # zwx at a text's start; with a space before it is another token
MODEL = ["validation.num_inference_steps=2", "trainer.accelerator=cpu", "trainer.progress=false"]


def unigram():
    """▁zwx is a whole word; xq only the end of a word."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("▁zwx", -9.0), ("xq", -9.5)]
    return T5Tokenizer(vocab=[*pieces, *((letter, -8.0) for letter in LETTERS)])


def qwen():
    merges = [*MERGES, ("Ġ", "zwx"), ("Ġ", "a"), ("x", "q")]
    tokens = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    return Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def gemma():
    merges = [*MERGES, ("▁", "zwx"), ("▁", "a"), ("x", "q")]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS, *(a + b for a, b in merges)]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


@pytest.mark.parametrize("build", [unigram, qwen, gemma])
def test_tokens_are_counted_for_words_inside_a_prompt(build, tmp_path):
    """Every kind of tokenizer has "zwx" after a space as one token, and "xq" only inside words."""
    build().save_pretrained(tmp_path / "tokenizer")
    (reader,) = vocabulary.load(str(tmp_path))
    found = vocabulary.single([reader], 4)
    assert "zwx" in found and "xq" not in found
    ((token,),) = reader.ids(["zwx"])
    prompt = reader.tokenizer("a zwx a", add_special_tokens=False).input_ids
    assert token in prompt and len(reader.ids(["xq"])[0]) > 1


def test_csv_lists_every_candidate_with_its_tokens(model, capsys, tmp_path):
    run_tool(capsys, "--tokenizer", model, "--count", "1", "--csv", tmp_path / "out" / "rare.csv")
    with (tmp_path / "out" / "rare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    readers = vocabulary.load(str(model))
    assert {row["word"] for row in rows} == {"qvz", "zwx", "xjy"}
    for row in rows:
        assert [int(row[reader.name]) for reader in readers] == [reader.ids([row["word"]])[0][0] for reader in readers]


def test_words_are_sorted_by_change_of_prediction(capsys, tmp_path):
    """The toybox was trained with "red" and never with "zwx"; each word is evaluated at the same timesteps and noises."""
    from dreambooth_lab import lab
    from dreambooth_lab.tools.rare_words.base_model_test import BaseModelTest

    free, again, red = BaseModelTest(lab.compose("model=toybox", *MODEL), None).movements(["zwx", "zwx", "red"])
    assert free == again and free < red / 3
    even = [vocabulary.Candidate(word, 0.5, 0.5, movement) for word, movement in (("far", 0.2), ("near", 0.1))]
    assert [one.word for one in vocabulary.ranked(even)] == ["near", "far"]


def test_rarest_words_are_evaluated_and_drawn_by_the_model(capsys, tmp_path):
    words = ["model=toybox", *MODEL, "--count", "2", "--drawn", "3", "--csv", tmp_path / "r.csv", "--sheet", tmp_path / "s.png"]
    code, out, err = run_tool(capsys, *words)
    assert code == 0, err
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["movement"]) for row in rows] == [True] * 3 + [False] * (len(rows) - 3)
    assert "not asked" not in out
    assert rows_of(tmp_path / "s.png") == 3, "the class, and two words"


def rows_of(path):
    """Number of rows of a sheet of toybox images."""
    with Image.open(path) as drawn:
        return (drawn.height - sheet.GAP) / (128 + sheet.TITLE + sheet.GAP)


def test_audit_with_a_model_draws_the_words(capsys, tmp_path):
    code, out, err = run_tool(capsys, "model=toybox", *MODEL, "--audit", "sks robot", "--sheet", tmp_path / "audit.png")
    assert code == 0 and "movement" in out, err
    assert rows_of(tmp_path / "audit.png") == 3, "the class, and two words"


def test_contradictory_options_are_refused(capsys, tmp_path):
    for options, named in (
        (["model=toybox", "--tokenizer", tmp_path], "--tokenizer"),
        (["--sheet", tmp_path / "s.png"], "--sheet"),
        (["--words", tmp_path / "absent.txt"], "--words"),
    ):
        code, _, err = run_tool(capsys, *options)
        assert code == 2 and named in err


def clips_own(folder):
    """The tokenizer of OpenAI's CLIP, from the vocabulary that open_clip ships."""
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        pytest.skip("open_clip, which ships CLIP's vocabulary, is not here: pip install --no-deps open_clip_torch")
    packed = Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, kept), *(chr(256 + i) for i in range(256 - len(kept)))]
    tokens = [*letters, *(one + "</w>" for one in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges).save_pretrained(folder / "tokenizer")


def test_clip_vocabulary_is_searched(capsys, tmp_path):
    """sks is one token with a high index; ohwx is another and a candidate; zwx is two tokens."""
    clips_own(tmp_path)
    (reader,) = vocabulary.load(str(tmp_path))
    assert reader.ids(["photo", "sks", "ohwx"]) == [[1125], [48136], [47993]] and len(reader.ids(["zwx"])[0]) == 2
    code, _, _ = run_tool(capsys, "--tokenizer", tmp_path, "--csv", tmp_path / "rare.csv")
    with (tmp_path / "rare.csv").open(newline="") as file:
        words = {row["word"]: float(row["place"]) for row in csv.DictReader(file)}
    assert code == 0 and words["ohwx"] > 0.97 and not {"sks", "dog", "emma", "def"} & words.keys()
