"""Enums: keys with a few possible values."""

from __future__ import annotations

from enum import Enum

ORTHO_TAIL = "ortho_tail"  # adapter.options.init
REGEX = "re:"  # prefix of an adapter target that is a regular expression


class Attention(Enum):
    auto = "auto"
    math = "math"
    flash = "flash"
    efficient = "efficient"
    cudnn = "cudnn"


class Offload(Enum):
    """The part of the frozen denoiser that is stored in host memory."""

    none = "none"
    blocks = "blocks"


class Prediction(Enum):
    """The prediction type of a network with a variance-preserving path."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"


class EmptyCaption(Enum):
    """The conditioning of a row without caption."""

    auto = "auto"
    zeros = "zeros"
    encoded = "encoded"


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


SIMPLETUNER_QUANT = {  # SimpleTuner's names → ours
    "no_change": "none", "int8-quanto": "int8", "int4-quanto": "int4", "int2-quanto": "int2", "fp8-quanto": "fp8",
    "int8-torchao": "int8_torchao", "int4-torchao": "int4_torchao", "fp8-torchao": "fp8_torchao", "nf4-bnb": "nf4",
}  # fmt: skip


class QuantKind(Enum):
    """Bits, and the library where it isn't optimum-quanto."""

    none = "none"
    int8 = "int8"
    int4 = "int4"
    int2 = "int2"
    fp8 = "fp8"
    int8_torchao = "int8_torchao"
    int4_torchao = "int4_torchao"
    fp8_torchao = "fp8_torchao"
    nf4 = "nf4"

    vars().update(SIMPLETUNER_QUANT)  # a second name for the same value is an alias


class LongCaptions(Enum):
    """The handling of captions beyond the text encoder's limit."""

    truncate = "truncate"
    chunk = "chunk"


class RankSchedule(Enum):
    """How many of an adapter's ranks act at a time."""

    none = "none"
    tlora = "tlora"


class Metadata(Enum):
    """The metadata in an export's headers and card."""

    full = "full"
    public = "public"
    none = "none"


class Format(Enum):
    """Files of an export."""

    diffusers = "diffusers"
    comfyui = "comfyui"
    peft = "peft"
    lycoris = "lycoris"


class Crop(Enum):
    center = "center"
    random = "random"
    corner = "corner"


class CropAspect(Enum):
    preserve = "preserve"
    square = "square"
    closest = "closest"
    random = "random"


class ResolutionType(Enum):
    pixel = "pixel"
    area = "area"
    pixel_area = "pixel_area"


class DatasetType(Enum):
    folder = "folder"
    table = "table"
    huggingface = "huggingface"
    simpletuner = "simpletuner"


class CaptionKind(Enum):
    instanceprompt = "instanceprompt"
    textfile = "textfile"
    filename = "filename"
    column = "column"


class MaskFrom(Enum):
    none = "none"
    files = "files"
    alpha = "alpha"


class PriorKind(Enum):
    none = "none"
    noise = "noise"
    teacher = "teacher"
    bank = "bank"
    weights = "weights"

    @property
    def has_class_rows(self) -> bool:
        """Whether it trains class images."""
        return self not in (PriorKind.none, PriorKind.weights)


class PriorSource(Enum):
    folder = "folder"
    generated = "generated"
    captions = "captions"
    blank = "blank"

    @property
    def recaptions(self) -> bool:
        """Whether class rows are the subject's own photos under other captions."""
        return self in (PriorSource.captions, PriorSource.blank)


class Outside(Enum):
    ignore = "ignore"
    teacher = "teacher"


class RolloutKind(Enum):
    model = "model"
    input_perturbation = "input_perturbation"


class RolloutTarget(Enum):
    corrected = "corrected"
    original = "original"


class Superclass(Enum):
    """How sampling takes the class prompt in."""

    none = "none"
    switch = "switch"
    mix = "mix"


class EmaValidation(Enum):
    none = "none"
    ema_only = "ema_only"
    comparison = "comparison"


class Mode(Enum):
    min = "min"
    max = "max"


class Ramp(Enum):
    linear = "linear"
    cosine = "cosine"


class Sampler(Enum):
    euler = "euler"
    dpm = "dpm"
    unipc = "unipc"


class Timesteps(Enum):
    uniform = "uniform"
    logit_normal = "logit_normal"


class Weight(Enum):
    none = "none"
    min_snr = "min_snr"
    soft_min_snr = "soft_min_snr"
    debiased = "debiased"
    learned = "learned"


class Anchor(Enum):
    """What holds the instance rows near the base model."""

    none = "none"
    dco = "dco"


class LossKind(Enum):
    l2 = "l2"
    huber = "huber"


class HuberSchedule(Enum):
    constant = "constant"
    snr = "snr"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    restarts = "restarts"


class OnExtend(Enum):
    """The schedule's behaviour when a resumed run is made longer."""

    refuse = "refuse"
    hold = "hold"
    stretch = "stretch"


class ReceiverKind(Enum):
    raw = "raw"
    discord = "discord"
