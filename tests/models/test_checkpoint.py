"""A checkpoint's files: which are read, what is refused before anything is loaded, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.models import files, weights
from dreambooth_lab.models.checkpoint import Checkpoint
from dreambooth_lab.quant import Quantiser

CPU, PLAIN = torch.device("cpu"), Quantiser({}, None)
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def weight_file(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def add_half(folder: Path, *parts: str, keep: bool) -> Path:
    """fp16 weights, doubled so that they differ from the plain ones, beside or instead of them."""
    for part in parts:
        plain = weight_file(folder, part)
        halved = {name: (2 * tensor).half() for name, tensor in load_file(plain).items()}
        save_file(halved, plain.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        if not keep:
            plain.unlink()
    return folder


def load(checkpoint: Checkpoint, part: str = "unet") -> torch.nn.Module:
    return checkpoint.load(part, torch.float32, CPU, PLAIN, [])


def weight(checkpoint: Checkpoint) -> torch.Tensor:
    return load(checkpoint).conv_in.weight


def test_variant_auto_prefers_fp16_files_and_null_uses_plain_files(tiny_sdxl, tmp_path):
    both = add_half(copy(tiny_sdxl, tmp_path / "m"), "unet", keep=True)
    plain = weight(Checkpoint(str(tiny_sdxl), None, "auto"))
    auto = Checkpoint(str(both), None, "auto")
    assert auto.read_variant == "fp16" and auto.weights["vae"].variant is None
    assert torch.equal(weight(auto), (2 * plain).half().float()), "fp16 beside plain files"
    assert torch.equal(weight(Checkpoint(str(both), None, "fp16")), weight(auto))
    assert torch.equal(weight(Checkpoint(str(both), None, None)), plain)


def test_folder_with_only_fp16_files_loads(tiny_sdxl, tmp_path):
    half = add_half(copy(tiny_sdxl, tmp_path / "m"), *NETWORKS, keep=False)
    checkpoint = Checkpoint(str(half), None, "auto")
    assert all(load(checkpoint, part).dtype is torch.float32 for part in NETWORKS)
    with pytest.raises(ConfigError, match=r"only weights of the variant fp16, and model\.variant is null; set it to auto"):
        Checkpoint(str(half), None, None)


def test_shards_of_a_variant_are_read(tiny_sdxl, tmp_path):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = copy(tiny_sdxl, tmp_path / "m")
    for kind, part in ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")):
        model = kind.from_pretrained(tiny_sdxl, subfolder=part)
        weight_file(folder, part).unlink()
        model.save_pretrained(folder / part, variant="fp16", max_shard_size="10KB")
    checkpoint = Checkpoint(str(folder), None, "auto")
    for part in ("unet", "text_encoder"):
        assert len(checkpoint.weights[part].files) > 1
        whole = load(Checkpoint(str(tiny_sdxl), None, None), part).state_dict()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in load(checkpoint, part).state_dict().items())
    checkpoint.weights["unet"].files[1].unlink()
    with pytest.raises(ConfigError, match=r"whose unet lacks diffusion_pytorch_model\.fp16-00002-of"):
        Checkpoint(str(folder), None, "auto")


def test_missing_variant_is_refused(tiny_sdxl):
    with pytest.raises(ConfigError, match=r"model\.variant is 'ema'.*model\.variant=auto.*model\.variant=null"):
        Checkpoint(str(tiny_sdxl), None, "ema")


def test_only_one_variant_is_downloaded():
    plain = {"config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    half = {"model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"}
    junk = {"pytorch_model.bin", "flax_model.msgpack", "model.ema.safetensors", "modeling_own.py"}
    assert weights.needed(plain | half | junk, "auto") == {"config.json"} | half
    assert weights.needed(plain | half | junk, None) == {"config.json", "model.safetensors"}
    assert weights.needed(plain | junk, "auto") == {"config.json", "model.safetensors"}
    legacy = {"diffusion_pytorch_model-00001-of-00001.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"}
    assert weights.needed(legacy, "fp16") == legacy


def only_pickles(folder: Path) -> None:
    weight_file(folder, "vae").rename(folder / "vae" / "diffusion_pytorch_model.bin")


def escape(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["../elsewhere"] = index["vae"]
    (folder / "model_index.json").write_text(json.dumps(index))


def cut(folder: Path) -> None:
    file = weight_file(folder, "unet")
    file.write_bytes(file.read_bytes()[:-4])


def escaping_shards(folder: Path) -> None:
    file = weight_file(folder, "unet")
    file.unlink()
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../secret.safetensors"}}
    (folder / "unet" / (file.name + ".index.json")).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (only_pickles, r"whose vae has diffusion_pytorch_model\.bin and no \.safetensors; pickles can run code"),
        (lambda m: shutil.rmtree(m / "tokenizer_2"), "has no folder tokenizer_2"),
        (lambda m: weight_file(m, "text_encoder").unlink(), r"whose text_encoder has no weight files"),
        (lambda m: (m / "model_index.json").write_text("{"), r"can't be read from model_index\.json"),
        (lambda m: (m / "model_index.json").write_text("[]"), r"model_index\.json that is not a JSON object"),
        (lambda m: (m / "model_index.json").write_text("{}"), r"model_index\.json that names no pipeline class"),
        (lambda m: (m / "unet" / "config.json").write_text("{,}"), r"whose unet can't be read from config\.json"),
        (lambda m: (m / "unet" / "config.json").unlink(), r"whose unet lacks config\.json"),
        (cut, r"whose unet has a damaged diffusion_pytorch_model\.safetensors"),
        (escape, r"names a component '\.\./elsewhere'"),
        (escaping_shards, "without a weight_map of plain file names"),
    ],
)
def test_missing_files_are_refused_before_loading(spoil, message, tiny_sdxl, tmp_path, monkeypatch):
    folder = copy(tiny_sdxl, tmp_path / "m")
    spoil(folder)
    with pytest.raises(ConfigError, match=r"model\.pretrained is .*" + message):
        Checkpoint(str(folder), None, "auto")


def test_unused_files_may_be_missing(tiny_sdxl, tmp_path):
    """Such as the safety checker, whose class belongs to the pipeline's own library."""
    folder = copy(tiny_sdxl, tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "safety_checker" not in Checkpoint(str(folder), None, "auto").parts


def test_identity_hashes_the_files_that_are_read(tiny_sdxl, tmp_path):
    folder = copy(tiny_sdxl, tmp_path / "m")

    def identity(variant: str | None = None) -> str:
        return Checkpoint(str(folder), None, variant).identity(("unet", "scheduler"), PLAIN)

    before = identity()
    add_half(folder, "unet", keep=True)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text("")
    assert identity() == before, "files that are not read"
    assert identity("auto") != before
    (folder / "scheduler" / "scheduler_config.json").write_text(
        (folder / "scheduler" / "scheduler_config.json").read_text() + " "
    )
    assert identity() != before


def test_digests_are_cached_until_a_file_changes(tiny_sdxl, tmp_path, monkeypatch):
    folder, opened = copy(tiny_sdxl, tmp_path / "m"), []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, kind: opened.append(stream.name) or real(stream, kind))

    def identity(cache: Path | None) -> tuple[str, int]:
        opened.clear()
        return Checkpoint(str(folder), None, None, cache).identity(("unet", "tokenizer"), PLAIN), len(opened)

    (plain, n), (first, m), (second, none) = identity(None), identity(tmp_path / "c"), identity(tmp_path / "c")
    assert plain == first == second and n == m > 2 and none == 0
    file = weight_file(folder, "unet")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    after, again = identity(tmp_path / "c")
    assert after != first and again == 1


def test_quantisation_reuses_the_digests(tiny_sdxl, tmp_path, monkeypatch):
    """The denoiser's files are hashed once for both the model's identity and its quantised weights."""
    checkpoint = Checkpoint(str(tiny_sdxl), None, None, tmp_path)
    checkpoint.identity(("unet",), PLAIN)
    monkeypatch.setattr(hashlib, "file_digest", None)
    checkpoint.load("unet", torch.float32, CPU, Quantiser({"unet": enums.QuantKind.int8}, tmp_path / "quant"), [])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_trim_releases_memory():
    import psutil

    def resident() -> int:
        return psutil.Process().memory_info().rss

    pieces = [torch.ones(16_000) for _ in range(3000)]  # 64 kB each: below the size that malloc maps by itself
    last = torch.ones(16_000)  # at the end of the heap: malloc keeps the free memory before it
    full = resident()
    del pieces
    files.trim()
    assert full - resident() > 100e6 and last.all()


REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, and the list of requests to the hub, which all fail."""
    import huggingface_hub
    from huggingface_hub import constants

    requests: list[str] = []

    def unreachable(repo: str, *_: object, **__: object) -> None:
        requests.append(repo)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, unreachable)
    return tmp_path / "hub", requests


def cache(pipeline: Path, root: Path) -> Path:
    repo = root / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    return copy(pipeline, repo / "snapshots" / REVISION)


def test_complete_hub_cache_needs_no_network(tiny_sdxl, hub_cache):
    root, requests = hub_cache
    folder = cache(tiny_sdxl, root)
    for revision in (None, "main", REVISION):
        checkpoint = Checkpoint("owner/name", revision, "auto")
        assert checkpoint.folder == folder and requests == []
    assert torch.equal(weight(checkpoint), weight(Checkpoint(str(tiny_sdxl), None, None)))


@pytest.mark.parametrize("lost", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json",
                                  "scheduler/scheduler_config.json", "model_index.json"])  # fmt: skip
def test_incomplete_hub_cache_uses_the_network(lost, tiny_sdxl, hub_cache):
    root, requests = hub_cache
    (cache(tiny_sdxl, root) / lost).unlink()
    with pytest.raises(
        ConfigError, match=r"'owner/name', which is not a folder, is not complete .*no route to the hub.*model\.pretrained"
    ):
        Checkpoint("owner/name", None, "auto")
    assert requests == ["owner/name"]


def test_only_needed_files_are_downloaded(tiny_sdxl, tmp_path, hub_cache, monkeypatch):
    """A download through the hub's client takes one variant and no pickles, code or unused files."""
    import huggingface_hub

    remote = add_half(copy(tiny_sdxl, tmp_path / "remote"), "unet", keep=True)
    (remote / "unet" / "diffusion_pytorch_model.bin").write_text("")
    (remote / "safety_checker").mkdir()
    (remote / "safety_checker" / "model.safetensors").write_text("")
    names = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]

    def snapshot(_: str, revision: str | None, allow_patterns: list[str]) -> str:
        for name in allow_patterns:
            (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, tmp_path / "here" / name)
        return str(tmp_path / "here")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, revision: str(remote / name))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, _, revision: names)
    assert Checkpoint("owner/name", None, "auto").read_variant == "fp16"
    assert [path.name for path in (tmp_path / "here").rglob("*.safetensors") if path.parent.name == "unet"] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    assert not (tmp_path / "here" / "safety_checker").exists() and not list((tmp_path / "here").rglob("*.bin"))


def test_other_models_are_read_from_the_cache_first():
    requests = []

    def load(name: str, local_files_only: bool = False, lacks: bool = False) -> str:
        requests.append(local_files_only)
        if local_files_only and lacks:
            raise OSError("not cached")
        return name

    assert files.cache_first(load, "owner/tae") == "owner/tae" and requests == [True]
    assert files.cache_first(load, "owner/tae", lacks=True) == "owner/tae" and requests == [True, True, False]
