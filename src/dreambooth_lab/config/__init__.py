"""The configuration: the typed schema of `conf/`, and `check`, which reports all problems together.

Python defines the legal values, YAML the chosen ones. Nothing here imports torch, so `--help`, `--cfg job` and errors take
well under a second.
"""

from .adapter_rules import (
    NOT_LYCORIS,
    ON_LYCORIS,
)
from .check import (
    ConfigError,
    Interrupted,
    Lost,
    RunError,
    check,
)
from .compose import LOCAL, PLACES, conf_dir, resolve_paths
from .division import is_sharded, processes, rows_per_batch, rows_per_step
from .enums import REGEX, SIMPLETUNER_QUANT
from .lycoris_file import (
    read_lycoris_file,
)
from .monitoring_rules import LEAKAGE
from .prompts import (
    Subject,
    class_prompt_of,
    rare_word,
    words,
)
from .resume_schedule import set_schedule_length
from .schema import (
    Config,
    PreviewConfig,
    ReceiverConfig,
)

__all__ = [
    "LEAKAGE",
    "LOCAL",
    "NOT_LYCORIS",
    "ON_LYCORIS",
    "PLACES",
    "REGEX",
    "SIMPLETUNER_QUANT",
    "Config",
    "ConfigError",
    "Interrupted",
    "Lost",
    "PreviewConfig",
    "ReceiverConfig",
    "RunError",
    "Subject",
    "check",
    "class_prompt_of",
    "conf_dir",
    "is_sharded",
    "processes",
    "rare_word",
    "read_lycoris_file",
    "resolve_paths",
    "rows_per_batch",
    "rows_per_step",
    "set_schedule_length",
    "words",
]
