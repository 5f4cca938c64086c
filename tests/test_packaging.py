"""Everything that the package reads at run time is installed with it: setup.cfg's lists against the files there are."""

import configparser
import fnmatch
from pathlib import Path

import pytest

import easyedit_nmke

ROOT = Path(easyedit_nmke.__file__).parents[1]


@pytest.fixture
def setup():
    parser = configparser.ConfigParser()
    parser.optionxform = str  # folders are named in capitals
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_folder_of_settings_is_installed(setup):
    listed = dict(setup["options.data_files"])
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "hparams").rglob("*") if path.is_file()}
    assert listed == {f"share/easyedit_nmke/{folder}": f"{folder}/*.yaml" for folder in folders}
    assert all(path.suffix == ".yaml" for path in (ROOT / "hparams").rglob("*") if path.is_file())


def test_every_file_beside_the_code_is_installed(setup):
    globs = setup["options.package_data"]["easyedit_nmke"].split()
    package = ROOT / "easyedit_nmke"
    files = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()]
    data = [name for name in files if not name.endswith((".py", ".pyc"))]
    assert not [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in globs)]
    assert not [pattern for pattern in globs if not fnmatch.filter(data, pattern)]


def test_every_folder_of_code_is_a_package():
    """`find:` takes only folders that have an __init__.py."""
    folders = {path.parent for path in (ROOT / "easyedit_nmke").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_versions_agree(setup):
    assert setup["metadata"]["version"] == easyedit_nmke.__version__
    assert f"## {easyedit_nmke.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
