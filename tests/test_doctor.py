"""`nmke doctor` tells what is here and what is missing, and fails for neither."""

import configparser
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from easyedit_nmke import cli
from easyedit_nmke.cli import doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture
def installed(monkeypatch, setup):
    """installed(name=version, ...): nothing else is installed; this package with the requirements of setup.cfg."""
    lines = setup["options"]["install_requires"].split("\n")[1:]
    extras = setup["options.extras_require"]
    for extra, listed in extras.items():
        for line in listed.split("\n")[1:]:
            name, _, marker = line.partition(";")
            lines.append(f"{name}; {marker + ' and' if marker else ''} extra == {extra!r}")

    def make(**packages):
        def version(name):
            if name.replace("-", "_") not in packages:
                raise metadata.PackageNotFoundError(name)
            return packages[name.replace("-", "_")]

        monkeypatch.setattr(doctor.metadata, "version", version)
        monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement(line) for line in lines])
        monkeypatch.setattr(doctor, "_extras", lambda: list(extras))

    return make


def found(part):
    return next(finding for finding in doctor.findings() if finding.part == part)


def test_one_aligned_line_each_however_narrow_the_terminal(capsys):
    findings = list(doctor.findings())
    assert doctor.run(None, Console(width=30)) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = [(line.index(f.part), line.index(f.found), line.index(f.meaning)) for line, f in zip(lines, findings, strict=True)]
    assert len(set(columns)) == 1


def test_the_shell_has_it_also_where_transformers_cannot_be_imported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["doctor"]) == 0
    assert "cannot be imported" in capsys.readouterr().out


def test_nothing_installed_is_told_and_is_no_failure(installed, monkeypatch, capsys):
    installed()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "nothing can be edited without it" in out and "lacks torch, transformers" in out
    assert found("extra figures").there is False and 'pip install -e ".[figures]"' in found("extra figures").meaning


def test_a_version_that_does_not_fit_is_named_with_what_is_needed(installed):
    installed(torch="2.13.0+cpu", transformers="4.57.1", peft="0.21.2")
    assert found("torch").there and found("torch").found.startswith("2.13.0+cpu, ")
    assert not found("transformers").there
    assert "transformers 4.57.1 (needs <6,>=5.0)" in found("transformers").meaning
    assert found("extra lora") == doctor.Finding("extra lora", True, "peft 0.21.2", doctor.EXTRAS["lora"])


def test_without_metadata_of_its_own_it_says_that_extras_are_unknown(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", "a-package-that-nobody-installs")
    assert not found("easyedit_nmke").there and "extras are unknown" in found("easyedit_nmke").meaning
    assert not [finding for finding in doctor.findings() if finding.part.startswith("extra ")]


def test_easyedit_is_found_without_importing_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "easyeditor").is_dir()])
    monkeypatch.delitem(sys.modules, "easyeditor", raising=False)
    monkeypatch.delenv("EASYEDIT_HOME", raising=False)
    assert found("EasyEdit").there is None and "git clone" in found("EasyEdit").meaning
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    assert found("EasyEdit").there is False and "no easyeditor/__init__.py" in found("EasyEdit").found
    (tmp_path / "easyeditor").mkdir()
    (tmp_path / "easyeditor" / "__init__.py").write_text("raise SystemExit('imported')")
    assert found("EasyEdit")[:3] == ("EasyEdit", True, str(tmp_path.resolve()))
    monkeypatch.setattr(doctor, "MULTIMODAL_PACKAGES", {"torch", "a_package_that_nobody_installs"})
    assert found("its image part").found == "without a_package_that_nobody_installs"


def test_gpus_are_named_and_a_torch_that_cannot_use_one_is_told(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert found("GPU").there is None
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/" + name)
    assert found("GPU").there is False and "CUDA build" in found("GPU").meaning
    card = type("Card", (), {"name": "NVIDIA H100", "total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    assert found("GPU")[1:3] == (True, "NVIDIA H100, 80 GB; NVIDIA H100, 80 GB")


@pytest.mark.parametrize("argv, heavy", [("doctor", "transformers"), ("--version", "torch")])
def test_no_model_is_loaded(argv, heavy):
    code = f"""
import sys
from easyedit_nmke import cli
try:
    cli.main([{argv!r}])
except SystemExit:
    pass
print({heavy!r} in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_version_names_what_decides_the_numbers(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    known = {name: metadata.version(name) for name in ("torch", "transformers")}
    assert capsys.readouterr().out == f"nmke 0.1.0, torch {known['torch']}, transformers {known['transformers']}\n"


def test_every_extra_says_what_it_is_for(setup):
    assert set(setup["options.extras_require"]) - {"test"} <= set(doctor.EXTRAS)
    assert set(doctor._extras()) <= set(doctor.EXTRAS)
