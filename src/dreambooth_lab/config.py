"""What a run may say: the typed schema of `conf/`, and `check`, which reports every problem at once.

Python says what is legal, YAML says what is chosen, so the dataclasses carry no defaults. Nothing here imports torch:
`--help`, `--cfg job` and every refusal come in well under a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf


class ConfigError(Exception):
    """A problem the user can mend; its text names the key, the value and the way out."""


def conf_dir() -> Path:
    """The folder of YAML files: inside the wheel, or at the root of a source checkout."""
    here = Path(__file__).resolve().parent
    return next(p for p in (here / "conf", here.parents[1] / "conf") if p.is_dir())


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


SIMPLETUNER_QUANT = {  # its spelling → ours
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


class PriorSource(Enum):
    folder = "folder"
    generated = "generated"
    captions = "captions"


class Outside(Enum):
    ignore = "ignore"
    teacher = "teacher"


class RolloutKind(Enum):
    walk = "walk"
    input_perturbation = "input_perturbation"


class RolloutTarget(Enum):
    corrected = "corrected"
    original = "original"


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


@dataclass
class ModelConfig:
    _target_: str
    pretrained: str
    revision: str | None
    variant: str | None
    dtype: Dtype
    encoder_dtype: Dtype
    tae: str | None
    resolution: int
    gradient_checkpointing: bool


@dataclass
class BlockConfig:
    match: str
    rank: int | None
    lr_ratio: float


@dataclass
class AdapterConfig:
    _target_: str
    algorithm: str
    rank: int
    alpha: float
    dropout: float
    parts: list[str]
    targets: list[str]
    blocks: list[BlockConfig]
    init_from: str | None
    options: dict[str, Any]
    preset: str | None
    train_token: bool
    token: str | None
    token_lr_ratio: float


@dataclass
class QuantConfig:
    kind: QuantKind
    text_encoder_1: QuantKind
    text_encoder_2: QuantKind
    cache: bool


@dataclass
class DatasetConfig:
    subject: str | None
    type: DatasetType
    path: str
    image_column: str
    caption_column: str | None
    split: str
    streaming: bool
    instance_prompt: str
    class_prompt: str | None
    prompts: list[str]
    caption: CaptionKind
    prepend_instance_prompt: bool
    only_instance_prompt: bool
    resolutions: list[float]
    resolution_type: ResolutionType
    max_aspect: float
    minimum_image_size: float
    maximum_image_size: float | None
    target_downsample_size: float | None
    max_upscale: float | None
    repeats: int
    crop: Crop
    crop_aspect: CropAspect
    crop_aspects: list[float]
    crop_variants: int
    flip: bool
    mask_from: MaskFrom
    mask_path: str | None
    caption_dropout: float
    batch_size: int


@dataclass
class GeneratedConfig:
    count: int
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    resolution: int
    batch_size: int
    seed: int


@dataclass
class BankConfig:
    draws: int
    batch_size: int


@dataclass
class PriorConfig:
    kind: PriorKind
    source: PriorSource
    path: str | None
    prompt: str | None
    weight: float
    share: float
    generated: GeneratedConfig
    bank: BankConfig


@dataclass
class MaskConfig:
    normalize: bool
    floor: float
    drop_probability: float
    outside: Outside


@dataclass
class ObjectiveConfig:
    timesteps: Timesteps
    logit_mean: float
    logit_std: float
    shift: float
    low: float
    high: float
    weight: Weight
    gamma: float
    loss: LossKind
    huber_c: float
    huber_schedule: HuberSchedule
    noise_offset: float
    noise_offset_probability: float


@dataclass
class ReflexFlowConfig:
    direction: float
    frequency: float


@dataclass
class RolloutConfig:
    enabled: bool
    kind: RolloutKind
    max_step_offset: int
    grid: Any  # a number of strides, or native
    shift: float
    probability: float
    ramp_steps: int
    ramp_shape: Ramp
    sampler: Sampler
    target: RolloutTarget
    min_time: float
    perturbation: float
    reflexflow: ReflexFlowConfig


@dataclass
class EmaConfig:
    enabled: bool
    decay: float
    update_interval: int
    device: str


@dataclass
class ValidationConfig:
    every_n_steps: int
    prompts: list[str]
    negative_prompt: str
    num_images: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    resolution: int


@dataclass
class EvalConfig:
    clip_model: str | None
    dino_model: str | None
    batch_size: int


class ReceiverKind(Enum):
    raw = "raw"
    discord = "discord"


@dataclass
class ReceiverConfig:
    kind: ReceiverKind
    url: str | None
    url_env: str | None
    token_env: str | None


@dataclass
class WebhookConfig:
    receivers: dict[str, ReceiverConfig]


@dataclass
class PreviewConfig:
    enabled: bool
    every_n_steps: int


@dataclass
class OptimizerConfig:
    _target_: str
    lr: float
    weight_decay: float
    options: dict[str, Any]
    schedule: Schedule
    warmup_steps: int
    cycles: int
    lora_plus_ratio: float


@dataclass
class TrainerConfig:
    max_steps: int
    accumulate_grad_batches: int
    gradient_clip_norm: float
    accelerator: str
    log_every_n_steps: int
    deterministic: bool
    progress: bool


@dataclass
class CheckpointConfig:
    every_n_steps: int
    keep_all: bool


@dataclass
class LoggerConfig:
    tensorboard: bool


@dataclass
class Config:
    model: ModelConfig
    adapter: AdapterConfig
    quant: QuantConfig
    dataset: DatasetConfig
    prior: PriorConfig
    mask: MaskConfig
    objective: ObjectiveConfig
    rollout: RolloutConfig
    ema: EmaConfig
    validation: ValidationConfig
    eval: EvalConfig
    preview: PreviewConfig
    webhook: WebhookConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    logger: LoggerConfig
    name: str
    seed: int
    runs: str
    cache: str
    resume: str | None
    preflight: str


class ExperimentFolder(SearchPathPlugin):
    """Lets `experiment=NAME` find the pinned experiments, which lie outside conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("experiments", f"file://{conf_dir().parent / 'experiments'}")


ConfigStore.instance().store(name="schema", node=Config)
for theirs, ours in SIMPLETUNER_QUANT.items():
    ConfigStore.instance().store(group="quant", name=theirs, node={"defaults": [ours]})
Plugins.instance().register(ExperimentFolder)
OmegaConf.register_new_resolver("package", lambda path: str(Path(__file__).resolve().parent / path), replace=True)


def check(cfg: DictConfig) -> None:
    """Raise one `ConfigError` that lists every problem of a composed config; silent when there is none."""
    absent = [f"{key} has no value; set {key}=…" for key in sorted(OmegaConf.missing_keys(cfg))]
    found = absent + list(_strangers(cfg)) + [text for text in _problems(Reader(cfg)) if text]
    if found:
        raise ConfigError(f"{len(found)} problem(s) in the configuration:\n" + "\n".join(f"  - {p}" for p in found))


def anchor(cfg: DictConfig) -> DictConfig:
    """The same configuration with its local paths made absolute, so that it means the same from any folder."""
    anchored = cfg.copy()
    for key in (
        "dataset.path",
        "dataset.mask_path",
        "prior.path",
        "cache",
        "model.pretrained",
        "model.tae",
        "eval.clip_model",
        "eval.dino_model",
    ):
        value = None if OmegaConf.is_missing(cfg, key) else OmegaConf.select(cfg, key)
        if value and (key == "cache" or Path(value).expanduser().exists()):
            OmegaConf.update(anchored, key, str(Path(value).expanduser().resolve()))
    return anchored


class Reader:
    """Reads keys for the checks; a missing value reads as None, since it is already reported by itself."""

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg

    def __call__(self, key: str) -> Any:
        return OmegaConf.select(self.cfg, key, default=None)

    def bounded(self, key: str, low: float, high: float = float("inf")) -> str | None:
        value = self(key)
        if value is None or low <= value <= high:
            return None
        legal = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        return f"{key} is {value}; it must be {legal}"

    def folder(self, key: str, what: str) -> str | None:
        value = self(key)
        if value is None or Path(value).expanduser().is_dir():
            return None
        state = "is a file" if Path(value).expanduser().exists() else "does not exist"
        return f"{key} is {value!r}, which {state}; it must be a folder with {what}"


def _strangers(node: DictConfig, schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Keys outside the schema, which `+key=…` adds without a word."""
    legal = get_type_hints(schema)
    for key in map(str, node):
        if key not in legal:
            near = get_close_matches(key, legal, n=1)
            yield f"{prefix}{key} is not a key of this project" + (f"; did you mean {prefix}{near[0]}?" if near else "")
        elif is_dataclass(legal[key]) and isinstance(child := node._get_node(key), DictConfig):
            yield from _strangers(child, legal[key], f"{prefix}{key}.")


BOUNDS: tuple[tuple[Any, ...], ...] = (
    ("adapter.rank", 1), ("adapter.alpha", 1e-6), ("adapter.dropout", 0, 0.99), ("adapter.token_lr_ratio", 0),
    ("dataset.max_aspect", 1, 8), ("dataset.minimum_image_size", 0), ("dataset.repeats", 0),
    ("dataset.crop_variants", 1), ("dataset.max_upscale", 0), ("dataset.maximum_image_size", 0),
    ("dataset.target_downsample_size", 0), ("dataset.caption_dropout", 0, 1), ("dataset.batch_size", 1),
    ("prior.weight", 0), ("prior.share", 0, 1), ("mask.floor", 0, 1), ("mask.drop_probability", 0, 1),
    ("prior.generated.count", 1), ("prior.generated.num_inference_steps", 1), ("prior.generated.guidance_scale", 0),
    ("prior.generated.batch_size", 1), ("prior.generated.seed", 0, 2**31 - 1),
    ("prior.bank.draws", 1), ("prior.bank.batch_size", 1),
    ("objective.logit_std", 1e-3), ("objective.shift", 1e-3), ("objective.low", 0, 1), ("objective.high", 0, 1),
    ("objective.gamma", 1e-6), ("objective.huber_c", 1e-6), ("objective.noise_offset", 0),
    ("objective.noise_offset_probability", 0, 1),
    ("rollout.max_step_offset", 1), ("rollout.shift", 1e-3), ("rollout.probability", 0, 1), ("rollout.ramp_steps", 0),
    ("rollout.min_time", 0, 1), ("rollout.perturbation", 0),
    ("rollout.reflexflow.direction", 0), ("rollout.reflexflow.frequency", 0),
    ("ema.decay", 0, 1), ("ema.update_interval", 1),
    ("validation.every_n_steps", 0), ("validation.num_images", 1), ("validation.num_inference_steps", 1),
    ("preview.every_n_steps", 1), ("eval.batch_size", 1),
    ("optimizer.lr", 0), ("optimizer.warmup_steps", 0), ("optimizer.weight_decay", 0),
    ("optimizer.cycles", 1), ("optimizer.lora_plus_ratio", 1e-3),
    ("trainer.max_steps", 1), ("trainer.accumulate_grad_batches", 1), ("trainer.gradient_clip_norm", 0),
    ("trainer.log_every_n_steps", 1), ("checkpoint.every_n_steps", 1), ("seed", 0, 2**31 - 1),
)  # fmt: skip


def _problems(read: Reader) -> Iterator[str | None]:
    """Everything that types can't say."""
    for key, *bounds in BOUNDS:
        yield read.bounded(key, *bounds)
    yield from _data_problems(read)
    yield from _prior_problems(read)
    yield from _objective_problems(read)
    yield from _model_problems(read)
    yield from _adapter_problems(read)
    yield from _optimizer_problems(read)
    yield from _eval_problems(read)
    yield from _preview_problems(read)
    if read("preflight") not in (None, "run", "only"):
        yield f"preflight is {read('preflight')!r}; it must be run, or only (stop before training)"
    if read("resume") is not None:
        yield read.folder("resume", "an earlier run of this project")
    if not str(read("name") or "x").replace("-", "").replace("_", "").isalnum():
        yield f"name is {read('name')!r}; it names a folder, so only letters, digits, - and _ are allowed"


def _optimizer_problems(read: Reader) -> Iterator[str | None]:
    target, schedule = str(read("optimizer._target_")), read("optimizer.schedule")
    library = target.partition(".")[0]
    if read("optimizer._target_") is not None and not find_spec(library):
        yield f"optimizer._target_ is {target!r}, but {library} is not installed; pip install 'dreambooth-lab[optimizers]'"
    free = "schedulefree" in target
    if free and schedule not in (None, Schedule.constant):
        yield f"optimizer.schedule is {schedule.name} with a schedule-free optimiser; use optimizer.schedule=constant"
    if free and read("ema.enabled"):
        yield "ema.enabled is true with a schedule-free optimiser, which averages by itself; set ema.enabled=false"
    if read("optimizer.cycles") not in (None, 1) and schedule is not Schedule.restarts:
        yield f"optimizer.cycles is {read('optimizer.cycles')}, which only schedule=restarts has; set optimizer.schedule=restarts"
    if read("optimizer.lora_plus_ratio") not in (None, 1.0) and read("adapter.algorithm") not in (None, "lora", "dora", "locon"):
        said = (
            f"optimizer.lora_plus_ratio is {read('optimizer.lora_plus_ratio')} with adapter.algorithm={read('adapter.algorithm')}"
        )
        yield f"{said}, which has no A and B; use lora, dora or locon, or set it to 1"


PEFT, ON_QUANTISED = ("lora", "dora"), ("lora", "dora", "locon", "loha", "lokr")
NOT_LYCORIS = {
    "full": "takes the base's weights away for: use adapter=full",
    "dylora": "can't load again",
    "ia3": "can't load again",
    "tlora": "can't put on padded convolutions",
}


def _adapter_problems(read: Reader) -> Iterator[str | None]:
    """Pairs that can't work, each with its reason: what the libraries would do instead is fail late, or something else."""
    algorithm, target = read("adapter.algorithm"), str(read("adapter._target_"))
    options = read("adapter.options") or {}
    decomposed = algorithm == "dora" or options.get("use_dora") or options.get("dora_wd") or options.get("weight_decompose")
    low, kind = read("model.dtype") not in (None, Dtype.float32), read("quant.kind") or QuantKind.none
    dtype = f"model.dtype is {read('model.dtype').name}" if low else ""
    if target.endswith(".LoRA") and algorithm not in PEFT:
        yield f"adapter.algorithm is {algorithm!r}; peft's are lora and dora; see adapter=lokr for LyCORIS"
    if target.endswith(".Lycoris") and algorithm in NOT_LYCORIS:
        yield f"adapter.algorithm is {algorithm!r}, which LyCORIS {NOT_LYCORIS[algorithm]}"
    if target.endswith(".Lycoris") and options.get("use_scalar"):
        yield "adapter.options.use_scalar is true: LyCORIS folds the scalar into its files, so a run can't go on; leave it out"
    if target.endswith(".Lycoris") and decomposed and low:
        yield f"adapter.options has weight decomposition and {dtype}, which LyCORIS can't mix; use float32 or adapter=dora"
    if read("adapter.preset") is not None and not target.endswith(".Lycoris"):
        yield f"adapter.preset is {read('adapter.preset')!r}, which only LyCORIS has; use adapter=lokr, or adapter.preset=null"
    if str(options.get("init_lora_weights", "")).lower().startswith("pissa"):
        yield "adapter.options.init_lora_weights is pissa, which rewrites the base; the prior's teacher needs it"
    if algorithm == "full" and low:
        yield f"{dtype} with adapter=full, where small updates are lost; set model.dtype=float32"
    place = read("adapter.init_from")
    if place is not None and not Path(place).expanduser().exists():
        yield f"adapter.init_from is {place!r}, which does not exist; give an export folder of a run, or a file of one"
    if kind is QuantKind.none:
        return
    if algorithm not in (None, *ON_QUANTISED):
        yield f"quant.kind is {kind.name}, but adapter={algorithm} needs the weights themselves; use quant=none"
    if algorithm in ON_QUANTISED and target.endswith(".Lycoris") and decomposed:
        yield f"quant.kind is {kind.name}, where LyCORIS silently drops dora_wd; use adapter=dora or quant=none"
    quanto = kind in (QuantKind.int8, QuantKind.int4, QuantKind.int2, QuantKind.fp8)
    if target.endswith(".LoRA") and decomposed and quanto and low:
        yield f"quant.kind is {kind.name} with DoRA and {dtype}, which peft can't mix; use float32 or quant=int8_torchao"


def _data_problems(read: Reader) -> Iterator[str | None]:
    from_file = read("dataset.type") is DatasetType.simpletuner
    yield _place_problem(read)
    if from_file:
        yield from _file_problems(read)
        return
    yield from _shape_problems(read)
    yield from _caption_and_mask_problems(read)


def _prior_problems(read: Reader) -> Iterator[str | None]:
    kind, source, path = read("prior.kind"), read("prior.source"), read("prior.path")
    if kind in (None, PriorKind.none) or read("dataset.type") is DatasetType.simpletuner:
        return
    if source is PriorSource.folder and path is None:
        ways = "prior.path=FOLDER, prior.source=generated (the base model draws them), or prior=none"
        yield f"prior.path is null, but prior.kind={kind.name} needs class pictures; set {ways}"
    elif source is PriorSource.folder:
        yield read.folder("prior.path", "class pictures")
    elif path is not None and source is not None:
        yield f"prior.path is {path!r}, which prior.source={source.name} does not read; use prior.source=folder, or leave it out"
    if source is PriorSource.captions and kind is PriorKind.noise:
        wrong = "prior.kind is noise with prior.source=captions, which would teach the class to look like the subject"
        yield f"{wrong}; use prior=teacher or prior=bank"
    if not read("prior.prompt"):
        yield 'prior.prompt is empty; set dataset.class_prompt="a photo of a dog" (the subject\'s class)'
    if read("prior.share") in (0, 1):
        yield f"prior.share is {read('prior.share')}; the share of class rows must lie inside (0, 1), or use prior=none"
    if kind is PriorKind.bank and read("rollout.enabled"):
        off = "the bank's answers are for points on the path, which rollout leaves"
        yield f"prior.kind is bank with rollout.enabled=true: {off}; use prior=teacher, or set rollout.enabled=false"


def _objective_problems(read: Reader) -> Iterator[str | None]:
    low, high = read("objective.low"), read("objective.high")
    if low is not None and high is not None and low >= high:
        yield f"objective.low is {low:g} and objective.high {high:g}; times are drawn between them, so low must be the lesser"
    if (grid := read("rollout.grid")) is not None and grid != "native" and (not isinstance(grid, int) or grid < 1):
        yield f"rollout.grid is {grid!r}; it must be a number of inference steps, at least 1, or native"
    terms = [read(f"rollout.reflexflow.{name}") for name in ("direction", "frequency")]
    if any(terms) and read("rollout.kind") is RolloutKind.input_perturbation:
        yield "rollout.reflexflow has terms, but rollout.kind=input_perturbation makes no walk they speak of; set them to 0"


def _eval_problems(read: Reader) -> Iterator[str | None]:
    for key in ("eval.clip_model", "eval.dino_model"):
        if read(key) and not read("validation.every_n_steps"):
            yield f"{key} is set, but validation.every_n_steps is 0, so there are no pictures to score; set it, or eval=none"
        if _is_absent_folder(read(key)):
            yield f"{key} is {read(key)!r}, a folder that does not exist; give a folder, a hub id, or null"


def _preview_problems(read: Reader) -> Iterator[str | None]:
    receivers = read("webhook.receivers") or {}
    if read("preview.enabled") and not read("validation.every_n_steps"):
        yield "preview.enabled is true, but validation.every_n_steps is 0, so nothing is drawn; set it, or preview.enabled=false"
    if read("preview.enabled") and not receivers:
        yield "preview.enabled is true, but nobody receives previews; choose webhook=raw or discord, or preview.enabled=false"
    for name, receiver in receivers.items():
        key = f"webhook.receivers.{name}"
        for field in ("url_env", "token_env"):
            if receiver[field] and not os.environ.get(receiver[field]):
                unset = f"{key}.{field} is {receiver[field]!r}, an environment variable that is not set"
                yield f"{unset}; export it, or choose webhook=none"
        address = receiver.url or os.environ.get(receiver.url_env or "", "http://")
        if not address.startswith(("http://", "https://")) or not (receiver.url or receiver.url_env):
            yield f"{key} has no http(s) address; set {key}.url, or {key}.url_env to a variable that holds one"


def _is_absent_folder(place: str | None) -> bool:
    """Whether a model's place can only be a folder, and isn't there; owner/name may be a hub id."""
    looks_local = bool(place) and (str(place).startswith((".", "/", "~")) or str(place).count("/") > 1)
    return looks_local and not Path(str(place)).expanduser().is_dir()


def _place_problem(read: Reader) -> str | None:
    place, kind = read("dataset.path"), read("dataset.type")
    if place is None or kind in (None, DatasetType.huggingface):
        return None
    if kind is DatasetType.folder:
        return None if "://" in place else read.folder("dataset.path", "the subject's photos")
    what = "a SimpleTuner dataset file (.json)" if kind is DatasetType.simpletuner else "a .csv or .parquet file"
    if Path(place).expanduser().is_file():
        return None
    state = "is a folder" if Path(place).expanduser().exists() else "does not exist"
    return f"dataset.path is {place!r}, which {state}; it must be {what}"


def _file_problems(read: Reader) -> Iterator[str | None]:
    """With a dataset file, what only folders have is refused rather than ignored."""
    if read("prior.path") is not None:
        said = f"prior.path is {read('prior.path')!r}"
        yield f"{said}, but class pictures come from the dataset file (is_regularisation_data); unset it"
    if read("prior.kind") is PriorKind.bank:
        yield "prior.kind is bank, which takes one class prompt and no dataset file; use prior=teacher"
    if read("prior.source") not in (None, PriorSource.folder):
        said = f"prior.source is {read('prior.source').name}"
        yield f"{said}, but class pictures come from the dataset file (is_regularisation_data); leave it out"
    if read("validation.every_n_steps") and not any(read("validation.prompts") or []):
        yield "validation.prompts is empty, and the dataset file has no instance_prompt; set dataset.instance_prompt=…"


def _shape_problems(read: Reader) -> Iterator[str | None]:
    sizes, unit = read("dataset.resolutions"), read("dataset.resolution_type")
    least, what = (0.01, "area of 0.01") if unit is ResolutionType.area else (16, "edge of 16 px")
    if sizes is not None and (not sizes or min(sizes) < least):
        yield f"dataset.resolutions is {sizes}; list at least one {what} or more"
    elif sizes is not None and unit is ResolutionType.area and max(sizes) > 64:
        yield f"dataset.resolutions is {sizes} times 1024² px; for edges in px use dataset.resolution_type=pixel_area"
    random = read("dataset.crop") is Crop.random or read("dataset.crop_aspect") is CropAspect.random
    if read("dataset.crop_variants") not in (None, 1) and not random:
        several = f"dataset.crop_variants is {read('dataset.crop_variants')} with dataset.crop={read('dataset.crop').name}"
        yield f"{several}, which has only one; use dataset.crop=random"
    aspects, kind = read("dataset.crop_aspects"), read("dataset.crop_aspect")
    if kind in (CropAspect.closest, CropAspect.random) and not aspects:
        yield f"dataset.crop_aspects is empty with dataset.crop_aspect={kind.name}; list some, such as [0.75,1.0,1.33]"
    if aspects and min(aspects) <= 0:
        yield f"dataset.crop_aspects is {aspects}; each is width / height, above 0"
    if (read("dataset.maximum_image_size") is None) != (read("dataset.target_downsample_size") is None):
        yield "dataset.maximum_image_size and dataset.target_downsample_size come together; set both or neither"


def _caption_and_mask_problems(read: Reader) -> Iterator[str | None]:
    columns = read("dataset.type") in (DatasetType.table, DatasetType.huggingface)
    if read("dataset.caption") is CaptionKind.column and not (columns and read("dataset.caption_column")):
        yield "dataset.caption is column; it needs dataset.caption_column=… and dataset.type=table or huggingface"
    if read("dataset.streaming") and read("dataset.type") is not DatasetType.huggingface:
        yield "dataset.streaming is true; only dataset.type=huggingface can be streamed"
    needs = read("dataset.caption") is CaptionKind.instanceprompt or read("dataset.prepend_instance_prompt")
    if needs and not read("dataset.instance_prompt") and not read("dataset.prompts"):
        yield 'dataset.instance_prompt is empty; set dataset.instance_prompt="a photo of sks dog"'
    files = read("dataset.mask_from") is MaskFrom.files
    if files and read("dataset.mask_path") is None:
        yield "dataset.mask_from is files; it needs dataset.mask_path=FOLDER"
    if read("dataset.mask_path") is not None and not files:
        said = f"dataset.mask_path is {read('dataset.mask_path')!r}"
        yield f"{said}, but dataset.mask_from={read('dataset.mask_from').name}; use files"
    elif read("dataset.mask_path") is not None and "://" not in read("dataset.mask_path"):
        yield read.folder("dataset.mask_path", "masks")


def _model_problems(read: Reader) -> Iterator[str | None]:
    if _is_absent_folder(read("model.pretrained")):
        absent = f"model.pretrained is {read('model.pretrained')!r}, a folder that does not exist"
        yield f"{absent}; give a diffusers folder or a hub id such as owner/name"
    if (
        not read("adapter.parts")
        and not read("adapter.targets")
        and not read("adapter.preset")
        and read("adapter.algorithm") != "full"
    ):
        yield "adapter.parts and adapter.targets are both empty; nothing would be trained"
    if read("ema.device") is not None and str(read("ema.device")).split(":")[0] not in ("cpu", "cuda"):
        yield f"ema.device is {read('ema.device')!r}; it must be cpu or cuda"
    for key in ("validation.resolution", "model.resolution", "prior.generated.resolution"):
        if read(key) is not None and (read(key) < 16 or read(key) % 8):
            yield f"{key} is {read(key)}; it must be a multiple of 8, at least 16"
