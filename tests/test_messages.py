"""Did you mean; how to install."""

import re
from pathlib import Path

import pytest

import easyedit_nmke
from easyedit_nmke.bench import shapes
from easyedit_nmke.messages import did_you_mean, how_to_install


@pytest.mark.parametrize(
    ("name", "hint"),
    [("amplificaton", " (did you mean 'amplification'?)"), ("l2", " (did you mean 'L2'?)"), ("ROMME", " (did you mean 'ROME'?)"),
     ("zebra", ""), ("", "")],
)  # fmt: skip
def test_the_name_that_is_most_like_it(name, hint):
    assert did_you_mean(name, (known for known in ("amplification", "L2", "ROME", "MEMIT"))) == hint


def test_shapes_of_the_bench():
    with pytest.raises(ValueError, match=r"no shape 'lama3-8b' \(did you mean 'llama3-8b'\?\); known: llama3-8b"):
        shapes.shape_named("lama3-8b")


def test_an_extra_is_installed_from_this_projects_checkout():
    """A package index may have another package of this project's name, so no message sends anybody there."""
    assert how_to_install("cuda") == """python -m pip install -e ".[cuda]" in this project's folder"""
    files = [path for path in Path(easyedit_nmke.__file__).parent.rglob("*") if path.suffix in (".py", ".j2", ".yaml", ".json")]
    wrong = re.compile(r"pip install [^\n]*easyedit[-_]nmke", re.IGNORECASE)
    assert len(files) > 50 and not [path for path in files if wrong.search(path.read_text(encoding="utf-8"))]
