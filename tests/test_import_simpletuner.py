import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import samples
from dreambooth_lab import lab
from dreambooth_lab.config import conf_dir
from dreambooth_lab.tools import import_simpletuner as tool
from dreambooth_lab.tools.simpletuner_options import OPTIONS

# the settings that SimpleTuner's DreamBooth page speaks of, and what a run can't do without
PAGE = {
    "base_model_precision": "int8-quanto", "text_encoder_1_precision": "no_change", "text_encoder_2_precision": "no_change",
    "text_encoder_3_precision": "no_change", "scheduled_sampling_max_step_offset": 10, "scheduled_sampling_probability": 1.0,
    "scheduled_sampling_ramp_steps": 1000, "scheduled_sampling_sampler": "unipc", "use_ema": True, "validation_preview": False,
    "validation_preview_steps": 5, "--data_aesthetic_score": 5.6, "--model_type": "lora", "--model_family": "sdxl",
    "learning_rate": "8e-5", "validation_prompt": 'a "sks", it\'s [a] dog = {x}', "hub_token": "hf_very_secret",
    "report_to": "none", "eval_epoch_interval": 0.5, "ema_validation": "ema_only",
}  # fmt: skip


@pytest.fixture
def config(photos, tmp_path):
    samples.save(tmp_path / "multidatabackend.json", samples.entry(photos))

    def make(**changes) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(PAGE | {"data_backend_config": "config/multidatabackend.json"} | changes))
        return path

    return make


def imported(config: Path, capsys, *words) -> tuple[int, str, Path]:
    output = config.parent / "search/experiment/mine.yaml"
    status = tool.main([str(config), "--output", str(output), *words])
    return status, " ".join(capsys.readouterr().out.split()), output


def test_the_written_experiment_composes_to_what_was_said(config, capsys):
    status, shown, output = imported(config(), capsys)
    assert status == 0, shown
    cfg = lab.compose("experiment=mine", f"hydra.searchpath=[file://{output.parents[1]}]")
    assert cfg.quant.kind.name == "int8" and cfg.rollout.enabled and cfg.rollout.grid == "native" and cfg.ema.enabled
    assert (cfg.rollout.sampler.name, cfg.rollout.ramp_steps, cfg.rollout.max_step_offset) == ("unipc", 1000, 10)
    assert not cfg.logger.loggers and cfg.eval.every_n_epochs == 0.5 and cfg.ema.validation.name == "ema_only"
    assert cfg.optimizer.lr == 8e-5 and list(cfg.validation.prompts) == [PAGE["validation_prompt"]]
    assert cfg.dataset.aesthetic_score == 5.6 and cfg.quant.text_encoder_3.name == "none"
    assert cfg.dataset.path == str(config().parent / "multidatabackend.json")


def test_every_option_is_told_and_no_secret_is_shown(config, capsys):
    options = tool.read(config(lr_scheduler="polynomial", loss_tpye="l2", train_batch_size="four"))
    _, became = tool.translate(options, Path())
    left = {one.option: one.note for one in became if not one.here}
    assert [one.option for one in became] == list(options)
    assert left["loss_tpye"] == "not known here; the nearest known is loss_type"
    assert left["lr_scheduler"].startswith("'polynomial' is not built") and left["train_batch_size"] == "'four' is no number"
    _, shown, output = imported(config(), capsys)
    assert "hub_token" in shown and "very_secret" not in shown + output.read_text()


@pytest.mark.parametrize(
    ("family", "flavour", "model"),
    [("sdxl", "refiner-1.0", "sdxl_refiner"), ("sdxl", "base-1.0", "sdxl"), ("deepfloyd", "ii-medium-450m", "deepfloyd_2"),
     ("flux", "schnell", "flux_schnell"), ("sd2x", "", "sd21")],
)  # fmt: skip
def test_a_flavour_chooses_its_own_model(family, flavour, model):
    said, _ = tool.translate({"model_family": family, "model_flavour": flavour}, Path())
    assert said["/model"] == model and (conf_dir() / "model" / f"{model}.yaml").is_file()


VALUES = ["1", 2, True, "false", "no_change", "sdxl", "lora", "full", "bf16", "adamw_bf16", "constant", "l2", "snr", "linear",
          "unipc", "cpu", "clip", "512x512", "tensorboard", "some/path"]  # fmt: skip


def test_whatever_is_taken_over_is_a_key_of_this_project():
    cfg, taken = lab.compose("dataset.path=x"), set()
    for option in OPTIONS:
        for value in VALUES:
            said, (became,) = tool.translate({option: value}, Path())
            assert bool(became.here) or became.note
            taken |= {option} if said else set()
            for key, chosen in said.items():
                files = [conf_dir() / key[1:] / f"{one}.yaml" for one in (chosen if isinstance(chosen, list) else [chosen])]
                known = OmegaConf.select(cfg, key, default=...) is not ...
                assert all(file.is_file() for file in files) if key.startswith("/") else known, key
    assert len(taken) > 50


@pytest.mark.parametrize(
    ("text", "said"),
    [("[", "line 1, column 2"), ("[]", "dataset=simpletuner"), (None, "can't be read")],
    ids=["json", "list", "none"],
)
def test_a_file_that_is_none_is_refused(tmp_path, capsys, text, said):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    assert tool.main([str(path), "--output", str(tmp_path / "o.yaml")]) == 2 and not (tmp_path / "o.yaml").exists()
    assert said in capsys.readouterr().err


def test_no_file_is_written_over_unasked(config, capsys):
    statuses = [imported(config(), capsys, *words)[0] for words in ([], [], ["--force"])]
    assert statuses == [0, 2, 0]


def test_what_is_still_to_be_done_is_said(config, capsys):
    status, shown, _ = imported(config(validation_preview=True), capsys)
    assert status == 1 and "still to be done" in shown and "nobody receives previews" in shown


def test_text_that_is_no_number_is_left_behind_rather_than_guessed():
    said, became = tool.translate({"lora_rank": "many", "use_ema": "perhaps"}, Path())
    assert not said and all(not one.here and one.note for one in became)


def test_a_value_chooses_no_other_value():
    said, (became,) = tool.translate({"validation_prompt": "${oc.env:HOME}"}, Path())
    assert not said and "reads another value" in became.note
