"""Did you mean."""

import pytest

from easyedit_nmke.bench import shapes
from easyedit_nmke.messages import did_you_mean


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
