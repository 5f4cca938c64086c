"""A state, a delta and an adapter that an earlier release wrote are read, with the same bits."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from easyedit_nmke import LifelongEditor, NMKEHyperParams, load_delta
from easyedit_nmke import atlas as embedded
from easyedit_nmke.history.log import standing

OLD = Path(__file__).parent / "data" / "version2"
DTYPES = {"llama": torch.float32, "gpt2": torch.bfloat16}


def sha(tensor):
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture(params=sorted(DTYPES))
def sample(request, tmp_path):
    """(folder of a copy, the base model, what is expected of it)."""
    folder = tmp_path / request.param
    shutil.copytree(OLD / request.param, folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=DTYPES[request.param])
    return folder, model.eval(), json.loads((folder / "expected.json").read_text())


def editor_of(folder, model, expected):
    tok = PreTrainedTokenizerFast.from_pretrained(embedded.DIRECTORY)
    hparams = NMKEHyperParams(
        model_name=(model, tok), state_dir=str(folder / "state"), stats_dir=str(folder), **expected["settings"]
    )
    editor = LifelongEditor.from_hparams(hparams)
    editor.open()
    return editor


def weights_of(model, names):
    return {name: sha(model.get_parameter(name)) for name in names}


def test_a_state_gives_the_same_bits_and_goes_on(sample):
    folder, model, expected = sample
    editor = editor_of(folder, model, expected)
    state = editor.state
    assert weights_of(model, expected["weights"]) == expected["weights"]
    masters = state.weights.masters.values()
    assert {str(layer): sha(master) for layer, master in enumerate(masters)} == expected["masters"]
    assert {str(layer): solver.count for layer, solver in state.solvers.items()} == expected["past_keys"]
    assert list(standing(state.events).values()) == ["superseded by 4", *["effective"] * 3, "undone", "effective"]
    editor.apply(embedded.requests(7)[6:])
    after = weights_of(model, expected["weights"])
    editor.close()
    again = editor_of(folder, AutoModelForCausalLM.from_pretrained(folder / "model", dtype=model.dtype).eval(), expected)
    assert weights_of(again.model, after) == after
    again.state.rollback(1)
    assert weights_of(again.model, after) == expected["after_1"]
    again.close()


def test_a_delta_gives_the_same_bits(sample):
    folder, model, expected = sample
    before = weights_of(model, expected["weights"])
    originals = load_delta(model, folder / "delta")
    assert weights_of(model, expected["weights"]) == expected["weights"]
    assert {name: sha(original) for name, original in originals.items()} == before


def test_an_adapter_gives_the_same_answers(sample):
    peft = pytest.importorskip("peft")
    folder, model, expected = sample
    adapted = peft.PeftModel.from_pretrained(model, folder / "lora")
    with torch.no_grad():
        logits = adapted(torch.tensor([[5, 77, 130, 9]])).logits[0, -1, :8].float()
    error = 1e-5 if model.dtype == torch.float32 else 0.05
    assert torch.allclose(logits, torch.tensor(expected["logits"]), rtol=error, atol=error)
