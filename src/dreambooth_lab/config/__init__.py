"""What a run may say: the typed schema of `conf/`, and `check`, which reports every problem at once.

Python says what is legal, YAML says what is chosen. Nothing here imports torch: `--help`, `--cfg job` and every refusal come in
well under a second.
"""

from .check import (
    ConfigError,
    check,
)
from .choices import (
    REGEX,
    SIMPLETUNER_QUANT,
    Attention,
    CaptionKind,
    Crop,
    CropAspect,
    DatasetType,
    Dtype,
    EmaValidation,
    HuberSchedule,
    LossKind,
    MaskFrom,
    Mode,
    Outside,
    PriorKind,
    PriorSource,
    QuantKind,
    Ramp,
    ReceiverKind,
    ResolutionType,
    RolloutKind,
    RolloutTarget,
    Sampler,
    Schedule,
    Timesteps,
    Weight,
)
from .composing import (
    anchor,
    conf_dir,
)
from .lycoris_file import (
    read_lycoris_file,
)
from .prompts import (
    rare_word,
    words,
)
from .schema import (
    Config,
    PreviewConfig,
    ReceiverConfig,
)

__all__ = [
    "REGEX",
    "SIMPLETUNER_QUANT",
    "Attention",
    "CaptionKind",
    "Config",
    "ConfigError",
    "Crop",
    "CropAspect",
    "DatasetType",
    "Dtype",
    "EmaValidation",
    "HuberSchedule",
    "LossKind",
    "MaskFrom",
    "Mode",
    "Outside",
    "PreviewConfig",
    "PriorKind",
    "PriorSource",
    "QuantKind",
    "Ramp",
    "ReceiverConfig",
    "ReceiverKind",
    "ResolutionType",
    "RolloutKind",
    "RolloutTarget",
    "Sampler",
    "Schedule",
    "Timesteps",
    "Weight",
    "anchor",
    "check",
    "conf_dir",
    "rare_word",
    "read_lycoris_file",
    "words",
]
