"""A SimpleTuner configuration becomes an experiment that runs; every option is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner, Result

import samples
import tiny
from dreambooth_lab import lab
from dreambooth_lab.config import ON_LYCORIS, ConfigError, conf_dir
from dreambooth_lab.tools.common import cli
from dreambooth_lab.tools.import_simpletuner import __main__ as tool
from dreambooth_lab.tools.import_simpletuner import families
from dreambooth_lab.tools.import_simpletuner.options import OPTIONS
from dreambooth_lab.tools.import_simpletuner.read import read
from dreambooth_lab.tools.import_simpletuner.translate import Kind, translate

LORA = {"model_family": "sdxl", "model_type": "lora"}
# the settings of SimpleTuner's DreamBooth page, and those that a run requires
PAGE = LORA | {
    "base_model_precision": "int8-quanto", "text_encoder_1_precision": "no_change", "text_encoder_2_precision": "no_change",
    "text_encoder_3_precision": "no_change", "scheduled_sampling_max_step_offset": 10, "scheduled_sampling_probability": 1.0,
    "scheduled_sampling_ramp_steps": 1000, "scheduled_sampling_sampler": "unipc", "use_ema": True, "validation_preview": False,
    "validation_preview_steps": 5, "--data_aesthetic_score": 5.6, "learning_rate": "8e-5", "hub_token": "hf_very_secret",
    "validation_prompt": 'a "sks", it\'s [a] dog = {x}', "report_to": "none", "eval_epoch_interval": 0.5,
    "ema_validation": "ema_only", "data_backend_config": "config/multidatabackend.json",
}  # fmt: skip


@pytest.fixture
def config(photos, tmp_path):
    """A configuration in a folder whose name has a space, and a dataset file beside it."""
    folder = tmp_path / "my config"
    folder.mkdir()
    samples.save(folder / "multidatabackend.json", samples.entry(photos))

    def make(**changes: object) -> Path:
        (folder / "config.json").write_text(json.dumps(PAGE | changes))
        return folder / "config.json"

    return make


def run(*words: object) -> Result:
    return CliRunner().invoke(tool.application, [str(word) for word in words])


def written(config: Path) -> Path:
    return config.parent / "imported/experiment/my_config.yaml"


def composed(experiment: Path, *words: str):
    return lab.compose(f"experiment={experiment.stem}", f'hydra.searchpath=["file://{experiment.parents[1]}"]', *words)


def kinds(**options: object) -> dict[str, Kind]:
    return {one.option: one.kind for one in translate(LORA | options, Path())[1]}


def test_written_experiment_composes_to_the_reported_values(config):
    result = run(config())
    assert result.exit_code == 0, result.output
    cfg = composed(written(config()))
    assert cfg.quant.kind.name == "int8" and cfg.rollout.enabled and cfg.rollout.num_steps == "native" and cfg.ema.enabled
    assert (cfg.rollout.sampler.name, cfg.rollout.ramp_steps, cfg.rollout.max_step_offset) == ("unipc", 1000, 10)
    assert not cfg.logger.loggers and cfg.eval.every_n_epochs == 0.5 and cfg.ema.validation.name == "ema_only"
    assert cfg.optimizer.lr == 8e-5 and list(cfg.validation.prompts) == [PAGE["validation_prompt"]]
    assert cfg.dataset.aesthetic_score == 5.6 and cfg.quant.text_encoder_3.name == "none"
    assert cfg.dataset.path == str(config().parent / "multidatabackend.json")
    assert all(word in result.output for word in ("Mapped", "No effect here", "--config-dir", "experiment=my_config"))


def test_shown_command_starts_the_experiment(config):
    shown = run(config(validation_prompt="a dog")).output
    words = next(line for line in shown.splitlines() if line.startswith("run it:")).removeprefix("run it:  python ")
    command = f"{sys.executable} {words} --cfg job"
    job = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=config().parent)
    assert job.returncode == 0 and "max_step_offset: 10" in job.stdout, job.stderr


def test_every_option_is_reported_without_secrets(config):
    options = read(config(lr_scheduler="sine", loss_tpye="l2", train_batch_size="four"))
    _, became = translate(options, Path())
    left = {one.option: one.note for one in became if one.kind is Kind.left}
    assert {one.option for one in became} == set(options)
    assert left["loss_tpye"] == "unknown option; the most similar known one is loss_type"
    assert left["lr_scheduler"].startswith("'sine' is not supported") and left["train_batch_size"] == "'four' is not a number"
    result = run(config())
    assert "hub_token" in result.output and "very_secret" not in result.output + written(config()).read_text()


VALUES = ["1", 2, True, "false", "no_change", "bf16", "fp16", "adamw_bf16", "constant", "l2", "snr", "linear", "unipc", "cpu",
          "clip", "512x512", "tensorboard", "some/path", "all+ffs"]  # fmt: skip


def test_mapped_options_are_existing_keys():
    cfg, taken = lab.compose("dataset.path=x"), set()
    for option in OPTIONS.keys() - LORA.keys():
        for value in VALUES:
            try:
                translation, became = translate(LORA | {"model_family": "flux"} | {option: value}, Path())
            except ConfigError:
                continue
            (one,) = (one for one in became if one.option == option)
            assert bool(one.here) == (one.kind is Kind.mapped) and (one.here or one.note)
            taken |= {option} if one.here else set()
            for key, chosen in translation.items():
                files = [conf_dir() / key[1:] / f"{name}.yaml" for name in (chosen if isinstance(chosen, list) else [chosen])]
                known = OmegaConf.select(cfg, key, default=...) is not ...
                assert all(file.is_file() for file in files) if key.startswith("/") else known, key
    assert len(taken) > 60


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "can't be read"),
        ("config.json", "[", "line 1, column 2"),
        ("config.json", "[]", "dataset=simpletuner"),
        ("config.json", "{}", "model_family is not set"),
        ("config.toml", "a = ", "invalid TOML"),
        ("config.env", "rm -rf x", "line 1"),
        ("config.env", "A=$(date)", "none is executed"),
        ("config.env", "A='b", "quotation mark"),
    ],
)
def test_invalid_file_is_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    result = run(tmp_path / name)
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)
    assert not (tmp_path / "imported").exists()


ENV = """
# a comment
export MODEL_FAMILY="sdxl"     # another
MODEL_TYPE='lora'
export DATALOADER_CONFIG=config/multidatabackend.json
MODEL_NAME="owner/my model"
USE_EMA=true
LR_SCHEDULE=cosine
VALIDATION_PROMPT="a photo of ${WHO}, it's $PLACE"
export TRAINER_EXTRA_ARGS="--base_model_precision=int8-quanto --lora_rank 4"
TRAINER_EXTRA_ARGS="${TRAINER_EXTRA_ARGS} --snr_gamma=5"
TRAINER_EXTRA_ARGS+=" --gradient_checkpointing"
"""


def test_all_three_formats_give_the_same_result(tmp_path):
    options = {"model_family": "sdxl", "model_type": "lora", "use_ema": True, "lora_rank": 4}
    (tmp_path / "a.json").write_text(json.dumps({f"--{name}": value for name, value in options.items()}))
    (tmp_path / "a.toml").write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in options.items()))
    (tmp_path / "a.env").write_text("MODEL_FAMILY=sdxl\nMODEL_TYPE=lora\nUSE_EMA=true\nTRAINER_EXTRA_ARGS='--lora_rank=4'\n")
    results = [translate(read(tmp_path / f"a.{kind}"), tmp_path)[0] for kind in ("json", "toml", "env")]
    assert results[0] == results[1] == results[2] and results[0]["adapter.rank"] == 4 and results[0]["ema.enabled"] is True


def test_shell_file_is_parsed_and_not_executed(tmp_path):
    (tmp_path / "config.env").write_text(ENV)
    options = read(tmp_path / "config.env")
    assert options == {
        "model_family": "sdxl", "model_type": "lora", "data_backend_config": "config/multidatabackend.json",
        "pretrained_model_name_or_path": "owner/my model", "use_ema": "true", "lr_scheduler": "cosine",
        "validation_prompt": "a photo of ${WHO}, it's $PLACE", "base_model_precision": "int8-quanto", "lora_rank": "4",
        "snr_gamma": "5", "gradient_checkpointing": True,
    }  # fmt: skip


def test_invalid_arguments_end_with_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: tool.application([str(tmp_path / "none.json")]))
    assert end.value.code == 2 and "none.json" in capsys.readouterr().err


def test_existing_files_are_not_overwritten_by_default(config):
    results = [run(config(), *words) for words in ([], [], ["--force"])]
    assert [result.exit_code for result in results] == [0, 1, 0] and "--force" in str(results[1].exception)


@pytest.mark.parametrize("where", ["mine.yaml", "experiment/my.run.yaml", "cached/experiment/mine.yaml"])
def test_output_name_invalid_for_hydra_is_refused(config, where, tmp_path):
    (tmp_path / "cached/cache").mkdir(parents=True)
    result = run(config(), "--output", tmp_path / where)
    assert isinstance(result.exception, ConfigError) and "--output" in str(result.exception)


def test_nothing_is_written_into_the_package(config):
    result = run(config(), "--output", tool.PACKAGE / "experiment/mine.yaml")
    assert "inside the installed package" in str(result.exception)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"validation_preview": True}, "there is no receiver"), ({"data_backend_config": "gone.json"}, "gone.json"),
     ({"tread_config": {"routes": []}}, "Not supported"), ({"lora_type": "lycoris"}, "lycoris_config.json"),
     ({"data_backend_config": None}, "dataset.path"), ({"max_train_steps": 0, "num_train_epochs": 0}, "trainer.max_steps")],
)  # fmt: skip
def test_remaining_steps_are_reported(config, changes, message):
    result = run(config(**changes))
    assert result.exit_code == 1 and message in result.output and written(config()).exists()


def test_command_line_files_take_precedence(config, tmp_path, photos):
    samples.save(tmp_path / "other.json", samples.entry(photos), samples.entry(photos, id="c", is_regularisation_data=True))
    (tmp_path / "lycoris.json").write_text('{"algo": "loha", "linear_dim": 4, "linear_alpha": 1}')
    result = run(config(), "--multidatabackend", tmp_path / "other.json", "--lycoris_config", tmp_path / "lycoris.json")
    cfg = composed(written(config()))
    assert result.exit_code == 0, result.output
    assert cfg.dataset.path.endswith("other.json") and cfg.prior.kind.name == "teacher"
    assert cfg.adapter.algorithm == "loha" and cfg.adapter.preset == str(tmp_path / "lycoris.json")
    assert run(config(), "--lycoris-config", tmp_path / "none.json").exit_code == 1


@pytest.mark.parametrize("algorithm", [*ON_LYCORIS, "tlora", "full", "lokrr"])
def test_each_lycoris_algorithm_is_mapped_or_named(tmp_path, algorithm):
    from lycoris.wrapper import network_module_dict

    (tmp_path / "lycoris.json").write_text(json.dumps({"algo": algorithm}))
    options = LORA | {"lora_type": "lycoris", "lycoris_config": "lycoris.json"}
    if algorithm in ON_LYCORIS:
        translation, _ = translate(options, tmp_path)
        own = OmegaConf.load(conf_dir() / "adapter" / f"{translation['/adapter']}.yaml").algorithm
        assert algorithm in network_module_dict and (translation.get("adapter.algorithm") or own) in (algorithm, "locon")
    else:
        with pytest.raises(ConfigError, match=f"algo '{algorithm}'"):
            translate(options, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_family": "wan"}, "makes video"), ({"model_family": "kolors"}, "not supported"), ({"model_family": "xyz"}, "known"),
     ({"model_family": "flux", "model_flavour": "kontext"}, "edits an input image"), ({"model_flavour": "base-9"}, "base-1.0"),
     ({"model_family": ""}, "model_family is not set"), ({"model_type": ""}, "model_type is not set"),
     ({"model_type": "deepfloyd-stage2-lora"}, "lora and full"), ({"lora_type": "dylora"}, "standard and lycoris"),
     ({"controlnet": True}, "controlnet"), ({"pretrained_model_name_or_path": "x.gguf"}, "GGUF"),
     ({"pretrained_transformer_model_name_or_path": "x/y"}, "denoiser")],
)  # fmt: skip
def test_unsupported_models_write_no_files(config, changes, message):
    result = run(config(**changes))
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)
    assert not written(config()).exists()


def test_every_flavour_is_mapped_or_refused_with_a_reason():
    for family, flavours in families.BUILT.items():
        for flavour, (model, checkpoint) in flavours.items():
            options = {"model_family": family, "model_flavour": flavour, "model_type": "lora"}
            if (family, flavour) in families.REFUSED:
                assert not model
                with pytest.raises(ConfigError, match="model_flavour"):
                    translate(options, Path())
            else:
                translation, _ = translate(options, Path())
                own = OmegaConf.load(conf_dir() / "model" / f"{translation['/model']}.yaml").pretrained
                assert translation.get("model.pretrained", own) == checkpoint
    assert {name for names in families.UNBUILT.values() for name in names}.isdisjoint(families.BUILT)


def test_missing_flavour_is_taken_from_the_checkpoint_or_default():
    def model(**options: str) -> tuple[str, str | None]:
        translation, _ = translate({"model_type": "lora"} | options, Path())
        return translation["/model"], translation.get("model.pretrained")

    assert model(model_family="flux") == ("flux", "black-forest-labs/FLUX.1-Krea-dev")
    assert model(model_family="z-image", model_flavour="base") == ("z_image", None)
    place = "stabilityai/stable-diffusion-3.5-large"
    assert model(model_family="sd3", pretrained_model_name_or_path=place)[0] == "sd35_large"


def test_training_type_changes_the_meaning_of_options():
    translation, became = translate(LORA | {"model_type": "full", "mixed_precision": "bf16", "lora_rank": 8}, Path())
    assert translation["/adapter"] == "full" and translation["model.dtype"] == "float32" and "adapter.rank" not in translation
    assert {one.option for one in became if one.kind is Kind.idle} == {"mixed_precision", "lora_rank"}
    assert translate(LORA | {"mixed_precision": "fp16"}, Path())[0]["model.dtype"] == "bfloat16"
    assert translate(LORA | {"use_dora": "true"}, Path())[0]["/adapter"] == "dora"


def test_time_shift_applies_to_flow_models_only():
    assert kinds(flow_schedule_shift=3)["flow_schedule_shift"] is Kind.idle
    translation, _ = translate({"model_family": "sd3", "model_type": "lora", "flow_schedule_shift": 3}, Path())
    assert translation["objective.shift"] == 3


def test_disabled_options_are_not_reported_as_unsupported():
    assert kinds(tread_config=None, ramtorch=False, quantize_activations="false")["ramtorch"] is Kind.idle
    reported = kinds(
        ramtorch=True, lora_rank="many", use_ema="perhaps", flux_lora_target="tiny", validation_prompt="${oc.env:HOME}"
    )
    assert {name for name, kind in reported.items() if kind is Kind.left} == reported.keys() - LORA.keys() - {
        "data_backend_config"
    }


@pytest.mark.parametrize(
    "sample", [pytest.param(samples.SUBJECT, id="subject"), pytest.param(samples.MASKED, id="masked", marks=pytest.mark.slow)]
)
def test_imported_page_runs_on_the_toybox(config, tmp_path, sample):
    """Its config.json fragments and its dataset files; 64 px, without quantisation, so that it takes seconds."""
    for name, seed in (("subjectname", 0), ("regularisation", 1)):
        tiny.save_photos(tmp_path / "datasets" / name, [(80, 80), (90, 90)], seed=seed)
    for name in ("dreambooth", "dreambooth_mask"):
        tiny.save_photos(tmp_path / "datasets/test_datasets" / name, [(80, 80), (90, 90)])
    sample = sample.replace('"repeats": 100', '"repeats": 0')  # instance and class rows in two steps
    for size in ("1024", "768", "512", "192"):
        sample = sample.replace(f": {size}", ": 64")
    data = samples.write(tmp_path / "data.json", sample, tmp_path)
    result = run(config(base_model_precision="no_change"), "--multidatabackend", data)
    assert result.exit_code == 0, result.output
    words = ["model=toybox", "trainer.max_steps=2", "dataset.batch_size=4", "validation.num_images=1",
             "validation.num_inference_steps=2", "validation.resolution=64", "trainer.accelerator=cpu",
             "trainer.progress=false", f"cache={tmp_path / 'latents'}", "'validation.prompts=[a dog]'"]  # fmt: skip
    start = tool.command(written(config())).replace("python", sys.executable, 1)
    job = subprocess.run(f"{start} {' '.join(words)}", shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-2000:]
    (metrics,) = tmp_path.glob("runs/*_my_config/metrics.csv")
    logged = {line.split(",")[1] for line in metrics.read_text().splitlines()}
    assert "train/loss" in logged and ("train/loss_prior" in logged) == (sample.count("is_regularisation_data") > 0)
