"""Checks of monitoring and exports: ema, validation, eval, preview, webhook, checkpoint, logger, export."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from . import enums
from .data_rules import lacks_prompt
from .prompts import Subject, library, rare_word
from .reader import Reader, installed, is_absent_folder

LEAKAGE = "eval/leakage"  # name of the metric
METRICS = {  # requirements of each family of logged metrics
    "train/": "",
    "eval/": "eval images (eval.path=FOLDER, or in a dataset file) and eval.every_n_steps",
    "clip/": "eval.clip_model and validation images",
    "subject/": "eval.clip_model or eval.dino_model, and validation images",
    "class/": "eval.clip_model or eval.dino_model, dataset.class_prompt, and validation images of the class",
}
FILE_NAME = r"\w[\w .()+-]{0,99}"  # valid on every system
NEEDED = {
    ".LoRA": {enums.Format.diffusers},
    ".Lycoris": {enums.Format.comfyui, enums.Format.lycoris},
}  # adapter → formats that it is read from


def problems(read: Reader) -> Iterator[str | None]:
    yield from _prompt_problems(read)
    yield from steering_problems(read)
    yield from _eval_problems(read)
    yield from _gallery_problems(read)
    yield from _leakage_problems(read)
    yield from _preview_problems(read)
    yield from _export_problems(read)
    yield from _hub_problems(read)
    yield from _checkpoint_problems(read)
    yield from _logger_problems(read)
    yield _race_problem(read)


def _race_problem(read: Reader) -> str | None:
    race = read("race")
    if race and not _evaluates(read):
        return f"race is {race}, but runs have no eval loss to race by; it needs {METRICS['eval/']}"
    if race and read("eval.num_images") == read("eval.timesteps") == 1:
        return f"race is {race}, but an eval loss of one image at one time has no interval; raise eval.timesteps"
    return None


def _generates_images(read: Reader) -> bool:
    return bool(read("validation.every_n_steps") or read("validation.every_n_epochs"))


def _evaluates(read: Reader) -> bool:
    pictures = read("eval.path") or read("dataset.type") is enums.DatasetType.simpletuner  # a dataset file may have some
    return bool(pictures and (read("eval.every_n_steps") or read("eval.every_n_epochs")))


def _prompt_problems(read: Reader) -> Iterator[str | None]:
    place, prompts = read("validation.library"), list(read("validation.prompts") or [])
    instance = read("dataset.instance_prompt")
    if place and instance:
        prefix = f"validation.library is {place!r}"
        try:
            if prompts != library(place, instance, read("dataset.class_prompt")):
                yield f"{prefix}, but validation.prompts is set too; remove one of them"
        except ValueError as error:
            yield f"{prefix}: {error}"
    elif (
        _generates_images(read)
        and not prompts
        and read("dataset.type") is not enums.DatasetType.simpletuner
        and not lacks_prompt(read)
    ):
        yield "validation.prompts is empty; list some, set dataset.instance_prompt, or validation.every_n_steps=0 for no images"


def steering_problems(read: Reader) -> Iterator[str | None]:
    """What sampling with the class prompt or with weaker weights needs."""
    superclass, share, personal = (read(f"validation.{key}") for key in ("superclass", "superclass_share", "personal_guidance"))
    if superclass not in (None, enums.Superclass.none):
        said = f"validation.superclass is {superclass.name}"
        if not read("adapter.token") and rare_word(read("dataset.instance_prompt") or "", read("dataset.class_prompt")) is None:
            yield f"{said}, but the rare word that the class prompt lacks is not clear; set dataset.class_prompt or adapter.token"
        if share in (0, 1):
            yield f"validation.superclass_share is {share:g} with {said}; it must lie between 0 and 1, or use superclass=none"
    if personal is None:
        return
    if personal == 1:
        yield "validation.personal_guidance is 1, which is plain guidance; set it below 1, or to null"
    if read("validation.guidance_scale") is not None and read("validation.guidance_scale") <= 1:
        scale = f"validation.guidance_scale={read('validation.guidance_scale'):g}"
        yield f"validation.personal_guidance is {personal:g} with {scale}, where there is no guidance; raise it, or use null"
    if read("adapter.algorithm") == "full":
        said = f"validation.personal_guidance is {personal:g} with adapter=full"
        yield f"{said}, whose strength can't be set while it trains; use null"


def _eval_problems(read: Reader) -> Iterator[str | None]:
    for key in ("eval.clip_model", "eval.dino_model"):
        if read(key) and not _generates_images(read):
            yield f"{key} is set, but validation.every_n_steps is 0, so there are no images to score; set it, or eval=none"
        if is_absent_folder(read(key)):
            yield f"{key} is {read(key)!r}, a folder that does not exist; give a folder, a hub id, or null"
    if read("eval.path") is not None:
        yield read.folder("eval.path", "images that are never trained on")
        if not _evaluates(read):
            prefix = f"eval.path is {read('eval.path')!r}, but eval.every_n_steps and eval.every_n_epochs are both 0"
            yield f"{prefix}, so the eval loss is never computed; set one of them"
        if read("dataset.caption") is enums.CaptionKind.column and not read("dataset.only_instance_prompt"):
            yield "eval.path is a folder, which has no caption column; use dataset.only_instance_prompt=true, or remove it"


def _gallery_problems(read: Reader) -> Iterator[str | None]:
    """The gallery ranks images of the subject by DINO's similarity."""
    if read("eval.gallery") is None:
        return
    yield read.folder("eval.gallery", "images of individuals that look like the subject")
    said = f"eval.gallery is {read('eval.gallery')!r}"
    if not read("eval.dino_model"):
        yield f"{said}, whose images DINO compares; set eval.dino_model (eval=paper, eval=toybox), or gallery to null"
    if not _generates_images(read):
        yield f"{said}, but validation.every_n_steps is 0, so there are no images to rank it by; set it, or gallery to null"
    subject = Subject(read("dataset.instance_prompt") or "", read("dataset.class_prompt"), read("adapter.token"))
    if not any(subject.is_subject(prompt) for prompt in read("validation.prompts") or []):
        yield f"{said}, but no prompt of validation.prompts is about the subject; add one with the rare word, or set it to null"


def _leakage_problems(read: Reader) -> Iterator[str | None]:
    """Leakage compares predictions for an eval image's caption with and without the rare word."""
    if not read("eval.leakage"):
        return
    if not _evaluates(read):
        yield f"eval.leakage is true, but there is no eval loss, whose draws it uses; it needs {METRICS['eval/']}"
    if not read("adapter.token") and rare_word(read("dataset.instance_prompt") or "", read("dataset.class_prompt")) is None:
        yield "eval.leakage is true, but the rare word is not clear; set dataset.class_prompt or adapter.token"
    if str(read("checkpoint.monitor")).removeprefix("ema/") == LEAKAGE:
        yield f"checkpoint.monitor is {read('checkpoint.monitor')!r}, which is lowest where nothing is learned; use eval/loss"


def _checkpoint_problems(read: Reader) -> Iterator[str | None]:
    monitor, mode, patience = read("checkpoint.monitor"), read("checkpoint.mode"), read("checkpoint.patience")
    if not monitor:
        if patience:
            yield f"checkpoint.patience is {patience}, but nothing is monitored; set checkpoint.monitor, such as eval/loss"
        return
    averaged, name = monitor.startswith("ema/"), monitor.removeprefix("ema/")
    family = next((prefix for prefix in METRICS if name.startswith(prefix)), None)
    start = f"checkpoint.monitor is {monitor!r}"
    if family is None or (averaged and family == "train/"):
        yield f"{start}, which is not a logged metric; they start with {', '.join(METRICS)}; all but the first also with ema/"
        return
    judged = _generates_images(read) and (read("eval.clip_model") or (read("eval.dino_model") and family != "clip/"))
    if not {"train/": True, "eval/": _evaluates(read)}.get(family, judged):
        yield f"{start}, which needs {METRICS[family]}"
    kind = read("prior.kind")
    if name == "train/loss_prior" and kind is not None and not kind.has_class_rows:
        yield f"{start}, but prior is {kind.name}; choose another prior or another metric"
    looked = read("ema.validation") if read("ema.enabled") else enums.EmaValidation.none
    if family != "train/" and looked is (enums.EmaValidation.none if averaged else enums.EmaValidation.ema_only):
        yield f"{start}, but {'only' if averaged else 'not'} the live weights are evaluated; set ema.enabled and ema.validation"
    if "loss" in name and mode is enums.Mode.max:
        yield f"checkpoint.mode is max, but {start}, a loss; use min"


def _logger_problems(read: Reader) -> Iterator[str | None]:
    for name, logger in (read("logger.loggers") or {}).items():
        key = f"logger.loggers.{name}"
        library, _, kind = logger._target_.rpartition(".")
        if not installed(logger.package):
            way_out = f"pip install {logger.package}, or remove it from logger"
            yield f"{key}.package is {logger.package!r}, which is not installed; {way_out}"
        elif not kind.endswith("Logger") or not library:
            yield f"{key}._target_ is {logger._target_!r}; it must name a class, such as lightning.pytorch.loggers.CSVLogger"


def _export_problems(read: Reader) -> Iterator[str | None]:
    name, formats, target = read("export.name"), read("export.formats"), str(read("adapter._target_"))
    if name is not None and not re.fullmatch(FILE_NAME, name):
        yield f"export.name is {name!r}, which is not a plain file name; set export.name to letters, digits, spaces and .-_+()"
    if formats is None:
        return
    for kind, needed in NEEDED.items():
        if target.endswith(kind) and not needed & set(formats):
            lines, least = [one.value for one in formats], " or ".join(sorted(one.value for one in needed))
            yield f"export.formats is {lines}; add {least}, which generate and lab.load need for this adapter"


def _hub_problems(read: Reader) -> Iterator[str | None]:
    if not read("export.push_to_hub"):
        return
    repo, variable = read("export.repo"), read("export.token_env")
    if repo is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        yield f"export.push_to_hub is true, but export.repo is {repo!r}; set it to owner/name, or export.push_to_hub=false"
    if not os.environ.get(str(variable)):
        unset = f"export.token_env is {variable!r}, an environment variable that is not set"
        yield f"{unset}; export a write token in it, or set export.push_to_hub=false"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield "export.push_to_hub is true, but HF_HUB_OFFLINE is set; unset it, or set export.push_to_hub=false"


def _preview_problems(read: Reader) -> Iterator[str | None]:
    receivers = read("webhook.receivers") or {}
    if read("preview.enabled") and not _generates_images(read):
        yield "preview.enabled is true, but validation.every_n_steps is 0, so no images; set it, or preview.enabled=false"
    if read("preview.enabled") and not receivers:
        yield "preview.enabled is true, but there is no receiver; choose webhook=raw or discord, or preview.enabled=false"
    for name, receiver in receivers.items():
        key = f"webhook.receivers.{name}"
        if receiver.kind is enums.ReceiverKind.discord and not _generates_images(read):
            yield f"{key} is set, but no images are generated, and Discord gets no metrics; set validation.every_n_steps"
        for field in ("url_env", "token_env"):
            if receiver[field] and not os.environ.get(receiver[field]):
                unset = f"{key}.{field} is {receiver[field]!r}, an environment variable that is not set"
                yield f"{unset}; export it, or choose webhook=none"
        address = receiver.url or os.environ.get(receiver.url_env or "", "http://")
        if not address.startswith(("http://", "https://")) or not (receiver.url or receiver.url_env):
            yield f"{key} has no http(s) address; set {key}.url, or {key}.url_env to a variable that holds one"
