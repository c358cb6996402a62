import pytest

from dreambooth_lab.toybox.captions import RARE_TOKENS, words
from dreambooth_lab.toybox.tokenizer import MAX_LENGTH, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_world_words_and_rare_words_are_single_tokens(tokenizer):
    for word in [*words(), *RARE_TOKENS]:
        assert len(tokenizer(word).input_ids) == 3, word  # start, word, end


def test_other_text_round_trips_as_bytes(tokenizer):
    ids = tokenizer("a zebra, naïve").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra,naïve"


def test_prompts_are_padded_to_the_models_length(tokenizer):
    ids = tokenizer("a photo of sks robot", padding="max_length", truncation=True).input_ids
    assert len(ids) == MAX_LENGTH and ids[6:] == [tokenizer.pad_token_id] * (MAX_LENGTH - 6)


def test_saved_tokenizer_loads_unchanged(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    text = "a photo of sks robot in the snow: 10 zebras!"
    assert again(text).input_ids == tokenizer(text).input_ids and again.model_max_length == MAX_LENGTH
