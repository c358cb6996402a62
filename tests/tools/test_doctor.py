"""tools.doctor describes the installation, and its report contains nothing private."""

from __future__ import annotations

import importlib.metadata
import socket
from pathlib import Path

import pytest
import torch

from dreambooth_lab.tools import doctor


@pytest.fixture
def private_environment(tmp_path, monkeypatch):
    """A fake machine: a home with a cache, a host name, secrets, and a module that fails with a path in its message."""
    home = tmp_path / "homes" / "annemarie"
    home.mkdir(parents=True)
    hub = home / "hub"
    repo = hub / "models--owner--model" / "snapshots" / "0a"
    repo.mkdir(parents=True)
    (repo / "weights").write_bytes(bytes(5_000_000))
    (hub / "models--owner--model" / "refs").mkdir()
    (hub / "models--owner--model" / "refs" / "main").write_text("0a")
    for name, value in {
        "HOME": home, "USER": "annemarie", "LOGNAME": "annemarie", "HF_HOME": home / "hf", "HF_TOKEN": "hf_verysecret",
        "OMP_NUM_THREADS": "3", "HTTPS_PROXY": "http://annemarie:pass@proxy", "TMPDIR": tmp_path,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(socket, "gethostname", lambda: "bigbox42")
    monkeypatch.setattr("platform.node", lambda: "bigbox42")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(hub), raising=False)
    monkeypatch.setitem(doctor.QUANT, "broken", f"no_module_in_{home.name}")
    monkeypatch.chdir(home)
    return home


def run_doctor(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        doctor.main([str(word) for word in words])
    return ended.value.code, capsys.readouterr().out


def test_report_lists_versions_devices_kernels_models_and_variables(private_environment, capsys):
    code, output = run_doctor(capsys)
    rows = {line.split("  ")[1].strip(): line for line in output.splitlines() if line.startswith("  ")}
    assert code == 0
    assert torch.__version__ in rows["torch"] and importlib.metadata.version("diffusers") in rows["diffusers"]
    assert "math" in rows["cpu float32"] and "cudnn" not in rows["cpu float32"]
    assert "imports" in rows["quanto"] and "no: ModuleNotFoundError" in rows["broken"]
    assert rows["OMP_NUM_THREADS"].endswith("3") and str(private_environment / "hf") in rows["HF_HOME"]
    assert "GB" in rows["free for runs"] and "0.01 GB" in rows["owner/model"]


def test_secrets_are_reported_only_as_set(private_environment, capsys, tmp_path):
    _, output = run_doctor(capsys, "--report", tmp_path / "report.txt")
    for text in (output, (tmp_path / "report.txt").read_text()):
        assert "HF_TOKEN" in text and "verysecret" not in text and "pass@" not in text


def test_report_has_no_home_user_host_or_path(private_environment, capsys, tmp_path):
    _, output = run_doctor(capsys, "--report", tmp_path / "report.txt")
    report = (tmp_path / "report.txt").read_text()
    assert str(private_environment) in output, "the terminal output has them"
    for private in (str(private_environment), str(Path.home()), "annemarie", "bigbox42", str(tmp_path)):
        assert private not in report
    assert "owner/model" in report and torch.__version__ in report and "OMP_NUM_THREADS" in report


def test_paths_inside_messages_are_cut(private_environment):
    odd = [doctor.Fact("quant", "a", f"no: OSError: {private_environment}/lib/x.so: bad, /opt/thing/y.so; bigbox42 annemarie")]
    text = doctor.scrubbed(odd)
    assert "/" not in text.replace("(a path)", "") and "annemarie" not in text and "bigbox42" not in text and "bad" in text


def test_missing_required_library_is_reported_with_exit_code_1(private_environment, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED", ("nosuch-library",))
    code, output = run_doctor(capsys)
    assert code == 1 and "nosuch-library" in output and "required" in output
