"""Libraries of validation prompts."""

import json

import pytest

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, Subject, check, resolve_paths


@pytest.mark.parametrize(
    ("name", "one"), [("objects", "a sks dog floating in an ocean of milk"), ("live", "a sks dog in a chef outfit")]
)
def test_paper_prompts_contain_the_subject(small, name, one):
    cfg = lab.compose(*small, f"validation.library=dreambooth_{name}")
    check(cfg)
    prompts = list(cfg.validation.prompts)
    assert len(prompts) == len(set(prompts)) == 25 and one in prompts and not any("{" in p for p in prompts)


@pytest.mark.parametrize(
    ("class_prompt", "token"), [("a photo of a dog", None), (None, "sks"), ("a dog", "sks"), ("a photo of a dog", "SKS")]
)
def test_prompt_is_about_the_subject_if_it_contains_the_rare_word(class_prompt, token):
    """Not any word missing from the class prompt: with "a dog" those include "photo" and "of"."""
    subject = Subject("a photo of sks dog", class_prompt, token)
    for prompt in ("a photo of sks dog on the beach", "sks dog, in the snow", "SKS", "a painting of a (sks) dog"):
        assert subject.is_subject(prompt) and not subject.is_class(prompt), prompt
    for prompt in ("a photo of a dog on the beach", "a photo of a cat", "a photo of sksy dog", ""):
        assert not subject.is_subject(prompt), prompt
    assert subject.is_class("a photo of a dog on the beach") is bool(class_prompt)
    assert not subject.is_class("a photo of a red car")


def test_subject_prompts_without_a_rare_word_contain_the_instance_prompt():
    """If several words could be the rare word, a prompt with one of them is scored neither as subject nor as class."""
    two = Subject("a photo of sks dog wearing glasses", "a photo of a dog", None)
    assert not two.rare and two.is_subject("a photo of sks dog wearing glasses, on the beach")
    assert not two.is_subject("a photo of sks dog") and not two.is_class("a photo of sks dog")
    assert two.is_class("a photo of a dog on the beach") and not two.is_class("a dog wearing a hat")
    subject = Subject("a photo of sks dog wearing glasses", "a photo of a dog", "sks")
    assert subject.is_subject("a photo of sks dog") and subject.is_class("a dog wearing a hat")
    any_of_them = Subject("a photo of sks dog", None, None)
    assert any_of_them.is_subject("a photo of sks dog in space")
    assert not any_of_them.is_subject("a photo of a dog in space") and not any_of_them.is_class("a photo of a dog in space")
    digits = Subject("a photo of ohwx2 dog", "a photo of a dog", "ohwx2")
    assert digits.is_subject("ohwx2 dog") and not digits.is_subject("ohwx dog 2")


def test_prompt_library_file_is_a_list_or_mapping_in_yaml_or_json(small, tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("- '{subject}, in the snow'\n- a {class}\n")
    (tmp_path / "b.json").write_text(json.dumps({"snow": "{subject}, in the snow", "kind": "a {class}"}))
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.json"):
        cfg = resolve_paths(lab.compose(*small, f"validation.library={name}"))
        monkeypatch.chdir("/")
        check(cfg)
        assert list(cfg.validation.prompts) == ["sks dog, in the snow", "a dog"]
        monkeypatch.chdir(tmp_path)
    assert list(lab.compose(*small).validation.prompts) == ["a photo of sks dog"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validation.library=nowhere.yaml"], "give dreambooth_live, dreambooth_objects, or a YAML or JSON file"),
        (["validation.library=dreambooth_live", "dataset.class_prompt=null", "prior=none", "prior.path=null"],
         "the rare word of dataset.instance_prompt='a photo of sks dog' can't be identified"),
        (["validation.library=dreambooth_live", "validation.prompts=[a dog]"], "validation.prompts is set too"),
        (["validation.prompts=[]"], "validation.prompts is empty"),
        (["validation.library=BAD"], "it must contain a list of prompts"),
    ],
)  # fmt: skip
def test_invalid_prompt_libraries_are_refused(small, tmp_path, words, message):
    (tmp_path / "bad.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError) as caught:
        check(lab.compose(*small, *(word.replace("BAD", str(tmp_path / "bad.yaml")) for word in words)))
    assert message in str(caught.value)
