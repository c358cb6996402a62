"""The model card's tables: what each file of an export is for, where to copy it, and how to use the trained token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from ..models.family import Family

MB = 1e6
COPY = {  # program → where to copy a LoRA's file, and how to use it
    "ComfyUI": "copy `{name}.safetensors` to `ComfyUI/models/loras/`; node *Load LoRA*",
    "A1111": "copy `{name}.safetensors` to `stable-diffusion-webui/models/Lora/`; write `<lora:{name}:1>` in the prompt",
    "Forge": "copy `{name}.safetensors` to `stable-diffusion-webui-forge/models/Lora/`; write `<lora:{name}:1>` in the prompt",
    "InvokeAI": "add `{name}.safetensors` in the *Model Manager*",
    "sd-scripts": '`--network_weights "{name}.safetensors"`',
}
SAY = {  # program → where to copy an embedding's file, and how to write it in a prompt
    "ComfyUI": "copy `{file}` to `ComfyUI/models/embeddings/`; write `embedding:{stem}` where this page writes `{word}`",
    "A1111": "copy `{file}` to `stable-diffusion-webui/embeddings/`; write `{stem}`, the file's name, as in the prompt above",
    "Forge": "copy `{file}` to `stable-diffusion-webui-forge/embeddings/`; write `{stem}`, as in the prompt above",
    "InvokeAI": "add `{file}` in the *Model Manager*; write `<{stem}>` where this page writes `{word}`",
}
FOR = {  # an adapter's name of a file → its purpose
    "diffusers": "diffusers: the code above",
    "peft": "peft: `PeftModel.from_pretrained`",
    "lycoris": "LyCORIS and SimpleTuner, with the library's own key names",
    "weights": "diffusers: the code above",
    "settings": "the adapter's settings in LyCORIS' format",
}
NOT_FOR_COMFYUI = "; **not for ComfyUI**, which skips its attention layers without a warning"
OTHERS = {
    "README.md": "this page",
    "images.png": "images with the adapter",
    "images_base.png": "images of the base model",
    "ema": "the averaged weights",
}


def table(folder: Path, files: Mapping[Path, str], family: Family, readers: Sequence[str]) -> str:
    """A table with a row for each file and folder of an export.

    Args:
        files: relative to the folder → the adapter's name of it.
        readers: programs that can read the adapter's file for other programs.
    """
    rows = [
        f"| `{_shown(folder, path)}` | {_weights(folder / path)} | {_purpose(kind, family, readers)} |"
        for path, kind in files.items()
    ]
    rest = {Path(other): text for other, text in OTHERS.items() if (folder / other).exists() or other == "README.md"}
    rows += [f"| `{_shown(folder, path)}` | | {text} |" for path, text in rest.items()]
    return "\n".join(["| file | weights | for |", "|---|---|---|", *rows])


def _shown(folder: Path, path: Path) -> str:
    return path.as_posix() + ("/" if (folder / path).is_dir() else "")


def _purpose(kind: str, family: Family, readers: Sequence[str]) -> str:
    if kind == "comfyui":
        return ", ".join(readers) or FOR["lycoris"]
    if kind == "embedding":
        return "the trained token"
    return FOR[kind] + (NOT_FOR_COMFYUI if kind == "diffusers" and family.denoiser_part == "unet" else "")


def _weights(path: Path) -> str:
    """Dtype and size of a file, or of those in a folder."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] * (path.suffix == ".safetensors")
    if not files:
        return ""
    size = sum(file.stat().st_size for file in files)
    return f"{', '.join(sorted(set(map(_dtype, files))))}, {size / MB:,.1f} MB"


def _dtype(file: Path) -> str:
    """Of the largest kind of tensors: alphas are scalars of their own dtype."""
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    with safe_open(file, "pt") as opened:
        slices = [opened.get_slice(key) for key in opened.keys()]  # noqa: SIM118
    dtype = next((one.get_dtype() for one in slices if one.get_shape()), "F32")
    return names.get(dtype, dtype)


def programs(files: Mapping[Path, str], readers: Sequence[str], name: str) -> str:
    """Where to copy the file for other programs, or why there is none.

    Args:
        readers: these programs; empty: none is known for this model.
        name: of the file, without its suffix.
    """
    if "weights" in files.values():
        return ""
    if "comfyui" in files.values():
        return "\n" + "".join(f"- **{program}**: {COPY[program].format(name=name)}\n" for program in readers)
    why = "compute such an adapter differently" if readers else "are not known to read LoRAs of this model"
    return f"\nThere is no file for ComfyUI, A1111 and similar programs: they {why}.\n"


def word_usage(word: str, file: Path, programs: Sequence[str]) -> str:
    """How to use the trained token in each program."""
    values = {
        program: SAY[program].format(file=file.as_posix(), stem=file.stem, word=word) for program in programs if program in SAY
    }
    rows = "\n".join(f"- **{program}**: {how}" for program, how in values.items())
    return f"""
## The trained token

The embedding of `{word}` was trained too. It is in `{file.as_posix()}`; without it the images differ from those on this page.

- **diffusers**: the code above replaces the word's own embedding, so prompts need no change
{rows}
"""
