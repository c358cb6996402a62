"""tools.generate reproduces a run's validation images, at any strength, from any of its files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.run import run
from dreambooth_lab.tools.generate import GenerateArgs, Picture, generate, grid, main, read

FAST = ["steps=2", "prompt=a photo of q dog"]
LEARNED = ["adapter.train_token=true", "adapter.token=q", 'dataset.instance_prompt="a photo of q dog"', "trainer.max_steps=3"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """Adapter kind → a finished run that also trained the token."""
    done = {}
    for kind, words in {"lora": ["adapter.text_encoders=[1,2]"], "lokr": ["adapter=lokr"], "full": ["adapter=full"]}.items():
        root = tmp_path_factory.mktemp("generate") / kind
        more = ["adapter.rank=1"] if kind == "full" else []
        run(lab.compose(*small, *LEARNED, *words, *more), root)
        done[kind] = lab.load(root)
    return done


def close(path, other) -> int:
    a, b = (torch.frombuffer(bytearray(Image.open(p).convert("RGB").tobytes()), dtype=torch.uint8).int() for p in (path, other))
    return int((a - b).abs().max())


@pytest.mark.parametrize("kind", ["lora", "lokr", "full"])
def test_strength_0_is_the_base_model_and_1_matches_validation(kind, finished, tmp_path):
    done = finished[kind]
    words = [f"run={done.folder.root}", *FAST, "seeds=2", "strengths=[1,0,0.5,1]", f"out={tmp_path / 'out'}"]
    assert generate(read(words)) == tmp_path / "out" / "grid.png"
    shown = done.folder.image_folder
    for seed in range(2):
        made = [tmp_path / "out" / f"{row:02d}_{seed:02d}.png" for row in range(4)]
        assert close(made[0], shown / "step_0000003" / f"00_{seed:02d}.png") <= 1
        assert close(made[1], shown / "step_0000000" / f"00_{seed:02d}.png") <= 1
        assert close(made[0], made[3]) == 0, "strengths leave the weights unchanged"
        assert close(made[2], made[0]) > 1 and close(made[2], made[1]) > 1


FILES = [("lora", "dreambooth.safetensors"), ("lora", "."), ("lora", "ema"), ("lokr", "dreambooth.safetensors"), ("full", "unet")]


@pytest.mark.parametrize(("kind", "file"), FILES)
def test_file_and_base_reproduce_the_runs_images(kind, file, finished, tiny_sdxl, tmp_path):
    done = finished[kind]
    alone = shutil.copytree(done.folder.export, tmp_path / "elsewhere")
    if kind == "full":
        shutil.copytree(alone / "embeddings", alone / "unet" / "embeddings")
    by_file = generate(read([f"file={alone / file}", f"model={tiny_sdxl}", *FAST, "seeds=[7]", f"out={tmp_path / 'a'}"]))
    by_run = generate(read([f"run={done.folder.root}", *FAST, "seeds=[7]", f"ema={file == 'ema'}", f"out={tmp_path / 'b'}"]))
    assert close(by_file, by_run) <= 1


def test_lora_without_configuration_requires_its_base_model(finished, tiny_sdxl, tmp_path):
    save_file(load_file(finished["lora"].folder.export / "dreambooth.safetensors"), tmp_path / "theirs.safetensors")
    words = [f"file={tmp_path / 'theirs.safetensors'}", *FAST, "seeds=1", "resolution=64"]
    with pytest.raises(ConfigError, match="has no configuration in its header; set model=BASE"):
        generate(read(words))
    grids = [generate(read([*words, f"model={tiny_sdxl}", f"strengths={s}", f"out={tmp_path / str(s)}"])) for s in (0, 1)]
    assert close(*grids) > 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("dreambooth_lab.adapter.LoRA", "subprocess.Popen"), "subprocess.Popen', which is no Adapter of this project"),
        (("name: dreambooth", "name: ${oc.env:HOME}"), "has interpolations"),
    ],
)
def test_untrusted_file_runs_no_code_and_reads_no_secret(edit, message, finished, tiny_sdxl, tmp_path):
    file = finished["lora"].folder.export / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert edit[0] in header["config"]
    save_file(load_file(file), tmp_path / "evil.safetensors", header | {"config": header["config"].replace(*edit)})
    with pytest.raises(ConfigError, match=message):
        generate(read([f"file={tmp_path / 'evil.safetensors'}", f"model={tiny_sdxl}", "prompt=a dog", f"out={tmp_path / 'out'}"]))


def test_images_store_their_settings_and_nothing_is_overwritten(finished, tmp_path):
    words = [f"run={finished['lora'].folder.root}", *FAST, "seeds=[3]", "negative=a: b", f"out={tmp_path / 'out'}"]
    first, second = generate(read(words)), generate(read(words))
    assert (first.parent.name, second.parent.name) == ("out", "out_2")
    settings = json.loads(Image.open(first.parent / "00_00.png").info["dreambooth_lab"])
    assert (settings["prompt"], settings["seed"], settings["strength"], settings["negative"]) == (
        "a photo of q dog",
        3,
        1.0,
        "a: b",
    )


def test_grid_has_rows_for_prompts_and_strengths_and_columns_for_seeds():
    requested = [Picture(prompt, strength, seed) for prompt in ("x", "y") for strength in (0.0, 1.0) for seed in (5, 6, 7)]
    made = [Image.new("RGB", (64, 48), (10 * i, 0, 0)) for i in range(12)]
    sheet = grid(requested, made, 3)
    line = (sheet.height - 4 * 48) // 5
    assert sheet.width == 3 * 64
    for i in range(12):
        x, y = i % 3 * 64 + 32, line + i // 3 * (48 + line) + line + 24
        assert sheet.getpixel((x, y)) == (10 * i, 0, 0)
    assert len(sheet.crop((0, 0, 64, line)).getcolors()) > 1, "the seed is written over its column"


def test_arguments_are_read_as_typed():
    ask = read(["run=r", "prompt=a photo: of, [sks] dog", "seeds=[4,2]", "strengths=0.5", "ema=true"])
    assert (ask.prompt, ask.seeds, ask.strengths, ask.ema) == (["a photo: of, [sks] dog"], [4, 2], [0.5], True)
    assert read(["run=r", 'prompt=["a, b", c]']).prompt == ["a, b", "c"] and GenerateArgs().out == "generated"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=x"], "either run=FOLDER or file=EXPORT"),
        (["run=a", "file=b", "prompt=x"], "either run=FOLDER or file=EXPORT"),
        (["run=a"], "prompt is None; give one, or a list"),
        (["run=a", "prompt=x", "seeds=[]"], "seeds is"),
        (["run=a", "prompt=x", "strengths=[a]"], "strengths is"),
        (["run=a", "prompt=x", "sedes=3"], "known: run, file"),
        (["run=a", "prompt=x", "steps=0"], "steps is 0"),
        (["run=a", "prompt=x", "model=b"], "remove it"),
        (["run=.", "prompt=x"], "is not a run folder"),
        (["file=/no/such.safetensors", "prompt=x"], "which does not exist"),
    ],
)
def test_invalid_arguments_are_refused(words, message):
    with pytest.raises(ConfigError) as error:
        generate(read(words))
    assert message in str(error.value)


def test_command_prints_the_grid_path_or_one_line_of_error(finished, tmp_path, capsys):
    words = [f"run={finished['lora'].folder.root}", *FAST, "seeds=1", f"out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0 and capsys.readouterr().out.strip().endswith("out/grid.png")
    with pytest.raises(SystemExit) as stopped:
        main([*words, "ema=maybe"])
    output = capsys.readouterr().err
    assert stopped.value.code == 2 and output.startswith("error: ") and output.count("\n") == 1
