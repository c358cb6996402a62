"""Libraries of validation prompts."""

import json

import pytest

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, anchor, check


@pytest.mark.parametrize(
    ("name", "one"), [("objects", "a sks dog floating in an ocean of milk"), ("live", "a sks dog in a chef outfit")]
)
def test_the_papers_prompts_have_the_subject_in_them(small, name, one):
    cfg = lab.compose(*small, f"validation.library=dreambooth_{name}")
    check(cfg)
    prompts = list(cfg.validation.prompts)
    assert len(prompts) == len(set(prompts)) == 25 and one in prompts and not any("{" in p for p in prompts)


def test_a_users_library_is_a_list_or_names_in_yaml_or_json(small, tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("- '{subject}, in the snow'\n- a {class}\n")
    (tmp_path / "b.json").write_text(json.dumps({"snow": "{subject}, in the snow", "kind": "a {class}"}))
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.json"):
        cfg = anchor(lab.compose(*small, f"validation.library={name}"))
        monkeypatch.chdir("/")
        check(cfg)
        assert list(cfg.validation.prompts) == ["sks dog, in the snow", "a dog"]
        monkeypatch.chdir(tmp_path)
    assert list(lab.compose(*small).validation.prompts) == ["a photo of sks dog"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["validation.library=nowhere.yaml"], "give dreambooth_live, dreambooth_objects, or a YAML or JSON file"),
        (["validation.library=dreambooth_live", "dataset.class_prompt=null", "prior=none", "prior.path=null"],
         "the rare word of dataset.instance_prompt='a photo of sks dog' is not clear"),
        (["validation.library=dreambooth_live", "validation.prompts=[a dog]"], "validation.prompts says others"),
        (["validation.prompts=[]"], "validation.prompts is empty"),
        (["validation.library=BAD"], "it must hold a list of prompts"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(small, tmp_path, words, said):
    (tmp_path / "bad.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError) as caught:
        check(lab.compose(*small, *(word.replace("BAD", str(tmp_path / "bad.yaml")) for word in words)))
    assert said in str(caught.value)
