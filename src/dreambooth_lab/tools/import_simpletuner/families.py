"""SimpleTuner's model families and flavours: the corresponding model of conf/, or why it is refused.

If a file names no flavour, SimpleTuner has a default one, which is used here too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ...config import conf_dir
from .values import NoEffect, Option, Options, Refused, Settings, Unsupported, is_off, no_effect

Flavour = tuple[str, str]  # of conf/model, "" for none; its checkpoint

# family → flavour → model and checkpoint; the first is SimpleTuner's default
BUILT: dict[str, dict[str, Flavour]] = {
    "sd1x": {
        "dreamshaper": ("sd15", "Lykon/dreamshaper-8"), "1.5": ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        "1.4": ("sd15", "CompVis/stable-diffusion-v1-4"), "realvis": ("", "SG161222/RealVisXL_V5.0"),
    },
    "sd2x": {
        "pseudoflex-v2": ("sd21", "bghira/pseudo-flex-v2"), "pseudojourney": ("sd21", "bghira/pseudo-journey-v2"),
        "digitaldiffusion": ("sd21", "Junglerally/Digital-Diffusion"), "2.1": ("sd21", "stabilityai/stable-diffusion-2-1"),
        "2.0": ("sd21", "stabilityai/stable-diffusion-2-0"),
    },
    "sdxl": {
        "base-1.0": ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
        "refiner-1.0": ("sdxl_refiner", "stabilityai/stable-diffusion-xl-refiner-1.0"),
        "base-0.9": ("sdxl", "stabilityai/stable-diffusion-xl-base-0.9"),
        "refiner-0.9": ("sdxl_refiner", "stabilityai/stable-diffusion-xl-refiner-0.9"),
    },
    "sd3": {
        "medium": ("sd3", "stabilityai/stable-diffusion-3.5-medium"),
        "large": ("sd35_large", "stabilityai/stable-diffusion-3.5-large"),
    },
    "flux": {
        "krea": ("flux", "black-forest-labs/FLUX.1-Krea-dev"), "dev": ("flux", "black-forest-labs/FLUX.1-dev"),
        "schnell": ("flux_schnell", "black-forest-labs/FLUX.1-schnell"),
        "fluxbooru": ("flux", "terminusresearch/fluxbooru-v0.3"),
        "kontext": ("", "black-forest-labs/FLUX.1-Kontext-dev"), "libreflux": ("", "jimmycarter/LibreFlux-SimpleTuner"),
    },
    "flux2": {
        "klein-9b": ("flux2_klein", "black-forest-labs/FLUX.2-klein-base-9B"),
        "klein-4b": ("flux2_klein", "black-forest-labs/FLUX.2-klein-base-4B"), "dev": ("", "black-forest-labs/FLUX.2-dev"),
    },
    "deepfloyd": {
        "i-medium-400m": ("deepfloyd_1", "DeepFloyd/IF-I-M-v1.0"), "i-large-900m": ("deepfloyd_1", "DeepFloyd/IF-I-L-v1.0"),
        "i-xlarge-4.3b": ("deepfloyd_1", "DeepFloyd/IF-I-XL-v1.0"), "ii-medium-450m": ("deepfloyd_2", "DeepFloyd/IF-II-M-v1.0"),
        "ii-large-1.2b": ("deepfloyd_2", "DeepFloyd/IF-II-L-v1.0"),
    },
    "z_image": {
        "turbo-ostris-v2": ("z_image", "Tongyi-MAI/Z-Image-Turbo"), "turbo": ("z_image", "Tongyi-MAI/Z-Image-Turbo"),
        "base": ("z_image", "Tongyi-MAI/Z-Image"), "ostris-de-turbo": ("", "ostris/Z-Image-De-Turbo"),
    },
    "qwen_image": {
        "v2.0": ("qwen_image", "Qwen/Qwen-Image-2512"), "v1.0": ("qwen_image", "Qwen/Qwen-Image"),
        "edit-v1": ("", "Qwen/Qwen-Image-Edit"), "edit-v2": ("", "Qwen/Qwen-Image-Edit-2509"),
        "edit-v2+": ("", "Qwen/Qwen-Image-Edit-2509"), "edit-v3": ("", "Qwen/Qwen-Image-Edit-2511"),
    },
    "chroma": {
        "base": ("chroma", "lodestones/Chroma1-Base"), "hd": ("chroma", "lodestones/Chroma1-HD"),
        "flash": ("chroma", "lodestones/Chroma1-Flash"),
    },
    "lumina2": {
        "2.0": ("lumina2", "Alpha-VLLM/Lumina-Image-2.0"), "neta-lumina": ("lumina2", "terminusresearch/neta-lumina-v1"),
    },
}  # fmt: skip
EDITS = "edits an input image, which is not supported"
REFUSED = {  # flavours without a model here
    ("sd1x", "realvis"): "is an SDXL checkpoint under sd1x: use model_family sdxl with it as pretrained_model_name_or_path",
    ("flux", "kontext"): EDITS, ("flux", "libreflux"): "is trained with masked attention, which model=flux does not have",
    ("flux2", "dev"): "has a Mistral text encoder, which model=flux2_klein does not have",
    ("z_image", "ostris-de-turbo"): "puts a transformer of another repository into the pipeline, which is not built",
    **{("qwen_image", flavour): EDITS for flavour in ("edit-v1", "edit-v2", "edit-v2+", "edit-v3")},
}  # fmt: skip
OF_NOISE = ("sd1x", "sd2x", "sdxl", "deepfloyd")  # the others are flow models
ASSISTED = {("flux", "schnell"), ("z_image", "turbo"), ("z_image", "turbo-ostris-v2")}  # trained over an assistant LoRA there
GENERAL = "; `model=diffusers model.pretrained=OWNER/NAME` trains pipelines without a family here, by its own configuration"
UNBUILT = {
    "makes video": (
        "cosmos3", "hunyuanvideo", "infinitetalk", "kandinsky5-video", "longcat_video", "ltxvideo", "ltxvideo2", "minimaxh3",
        "sanavideo", "wan", "wan_s2v",
    ),
    "makes sound": ("ace_step", "heartmula", "minimaxmusic"),
    f"is an image family that is not supported{GENERAL}": (
        "anima", "auraflow", "boogu_image", "bria", "cosmos2image", "ernie", "hidream", "ideogram", "kandinsky5-image", "kolors",
        "krea2", "longcat_image", "mageflow", "omnigen", "pixart_sigma", "sana", "stable_cascade", "z_image_omni", "zlab_i1",
    ),
}  # fmt: skip
OLD_NAMES = {"z-image": "z_image", "qwen-image": "qwen_image", "pixart": "pixart_sigma", "cosmos": "cosmos2image",
             "kandinsky5_image": "kandinsky5-image", "kandinsky5_video": "kandinsky5-video"}  # fmt: skip


def built() -> str:
    return ", ".join(BUILT)


def of(options: Options) -> tuple[str, str, Flavour]:
    """Family, flavour, and what they are here.

    Raises:
        Refused: there is no such model here.
    """
    family = OLD_NAMES.get(str(options["model_family"]), str(options["model_family"]))
    if family not in BUILT:
        why = next((why for why, names in UNBUILT.items() if family in names), f"is not a known family of SimpleTuner{GENERAL}")
        raise Refused(f"model_family is {family!r}, which {why}; supported are {built()}")
    flavours = BUILT[family]
    flavour = str(options.get("model_flavour") or _by_checkpoint(options, flavours) or next(iter(flavours)))
    if flavour not in flavours:
        raise Refused(f"model_flavour is {flavour!r}; {family} has {', '.join(flavours)}")
    if (family, flavour) in REFUSED:
        raise Refused(f"model_flavour is {flavour!r}, which {REFUSED[family, flavour]}")
    return family, flavour, flavours[flavour]


def is_assisted(options: Options) -> bool:
    """Whether SimpleTuner trains this flavour over an assistant LoRA."""
    return of(options)[:2] in ASSISTED


def is_flow(options: Options) -> bool:
    """Whether a time shift has an effect; SimpleTuner ignores it for noise-prediction models."""
    return of(options)[0] not in OF_NOISE


def _by_checkpoint(options: Options, flavours: dict[str, Flavour]) -> str | None:
    place = str(options.get("pretrained_model_name_or_path", "")).lower()
    return next((name for name, (_, checkpoint) in flavours.items() if checkpoint.lower() == place), None)


def _family(_: Any, options: Options) -> Settings:
    model, checkpoint = of(options)[2]
    settings: Settings = {"/model": model}
    if not options.get("pretrained_model_name_or_path") and checkpoint != _own(model):
        settings["model.pretrained"] = checkpoint
    return settings


def _checkpoint(value: Any, options: Options) -> Settings:
    place = str(value)
    if is_off(value):
        raise NoEffect("the flavour's own is used")
    if place.lower().endswith(".gguf"):
        raise Refused(
            f"pretrained_model_name_or_path is {place!r}; GGUF files are not read: give a hub id, a folder or .safetensors"
        )
    if place.lower() == _own(of(options)[2][0]).lower():
        return {"/model": of(options)[2][0]}
    return {"model.pretrained": place}


def _assistant(value: Any, options: Options) -> Settings:
    if is_off(value) and is_assisted(options):
        raise Unsupported(
            "SimpleTuner trains this flavour over an assistant LoRA, which is not supported; it may lose its few-step quality"
        )
    raise NoEffect("there is no assistant LoRA here")


def _own(model: str) -> str:
    """The checkpoint that conf/model has for it."""
    path: Path = conf_dir() / "model" / f"{model}.yaml"
    return str(OmegaConf.load(path).pretrained)


FAMILY_OPTIONS = {
    "model_family": Option(_family),
    "model_flavour": no_effect("goes with model_family"),
    "pretrained_model_name_or_path": Option(_checkpoint),
    "disable_assistant_lora": Option(_assistant),
}
