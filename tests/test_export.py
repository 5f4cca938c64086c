"""What is exported comes back onto a fresh base model and is the edited one."""

import dataclasses
import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_baselines import settings  # noqa: F401

from easyedit_nmke import atlas as embedded
from easyedit_nmke import files, load_delta, methods
from easyedit_nmke.history import delta, export
from easyedit_nmke.history.weights import EditedWeights
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.updates import Dense, LowRank, Sparse, accumulate, of_parameter
from easyedit_nmke.models.weights import Matrices
from easyedit_nmke.scores import generation

CARD = export.Card("some/model", "0123456789abcdef", "NMKE", 5, "2026-01-31", [{"Edits": 5, "Rel": 0.98, "Gen": None}])
FAMILIES = ["llama", "qwen2", "gpt2", "gptj"]


def some_updates(model, columns=(1, 3, 1), layers=(0, 2), seed=0, spare=()):
    """Updates of some calls, half of the neurons masked, written into the model; layers in `spare` miss the last call."""
    view, generator, updates = ModelView(model), torch.Generator().manual_seed(seed), []
    weights = EditedWeights()
    weights.now = Matrices(view, [view.weight_name(layer) for layer in layers])
    weights.masters = {name: weight.float().clone() for name, weight in weights.now.items()}
    for number, k in enumerate(columns):
        for layer in layers:
            if layer in spare and number == len(columns) - 1:
                continue
            name, weight = view.weight_name(layer), view.w_out(layer)
            mask = torch.rand(weight.shape[1], generator=generator) < 0.5
            right = torch.randn(k, weight.shape[1], generator=generator) * mask / 30
            made = weights.write(LowRank(name, torch.randn(len(weight), k, generator=generator), right), [])
            weights.settle([made])
            updates.append(made)
    return updates


def down(model, layers=(0, 2)):
    view = ModelView(model)
    return {view.weight_name(layer): view.weight(layer).detach().clone() for layer in layers}


def before(model, layers=(0, 2)):
    view = ModelView(model)
    return {view.weight_name(layer): view.w_out(layer).clone() for layer in layers}


def logits(model, seed=0):
    tokens = torch.randint(3, 500, (3, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(tokens).logits


def same_bits(one, other):
    return (
        all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one) and one.keys() == other.keys()
    )


@pytest.fixture
def edited(tiny, tmp_path):
    """edited(kind, dtype=..., **updates) -> (base model, edited model, updates, originals)."""

    def make(kind, dtype=torch.float32, **choice):
        base = tiny(kind)[0].to(dtype)
        model = deepcopy(base)
        updates = some_updates(model, **choice)
        return base, model, updates, before(base)

    return make


# ---- the delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_delta_gives_the_bits_of_the_edited_model_and_can_be_taken_back(kind, dtype, edited, tmp_path):
    base, model, updates, originals = edited(kind, dtype)
    export.export_delta(model, updates, originals, tmp_path / "out", CARD)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"delta.safetensors", "README.md"}
    unedited = down(base)
    taken = load_delta(base, tmp_path / "out")
    assert same_bits(base.state_dict(), model.state_dict())
    assert same_bits(taken, unedited)
    with torch.no_grad():
        for name, tensor in taken.items():
            base.get_parameter(name).copy_(tensor)
    assert same_bits(down(base), unedited)


def test_masked_neurons_take_a_bit_each(edited, tmp_path):
    base, model, updates, originals = edited("llama")
    export.export_delta(model, updates, originals, tmp_path / "out", CARD)
    stored = load_file(tmp_path / "out" / delta.FILE)
    kept = sum((update.right != 0).sum().item() for update in updates if update.parameter.split(".")[2] == "0")
    assert stored["0.values"].shape == (kept,) and stored["0.mask"].shape == (5, 96 // 8) and stored["0.left"].shape == (32, 5)
    dense = [update._replace(right=update.right + 1) for update in updates]
    for name, original in originals.items():
        accumulate(ModelView(base).matrix(name), original, of_parameter(dense, name))
    export.export_delta(base, dense, originals, tmp_path / "dense", CARD)
    assert {name.split(".")[1] for name in load_file(tmp_path / "dense" / delta.FILE)} == {"left", "right"}


def test_signs_of_zeros_and_ragged_widths_come_back():
    right = torch.tensor([[0.0, -0.0, 1e-45, *[0.0] * 60, -1.0], [0.0] * 64, [-0.0] * 64])[:, :63]
    right = right.contiguous()
    stored = delta._packed(right)
    assert "mask" in stored
    assert torch.equal(delta._unpacked(stored, 63).view(torch.int32), right.view(torch.int32))


def test_a_delta_of_another_model_is_refused_and_nothing_changes(edited, tiny, tmp_path):
    base, model, updates, originals = edited("llama")
    export.export_delta(model, updates, originals, tmp_path / "out", CARD)

    def refused(other, *parts):
        was = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match="some/model") as error:
            load_delta(other, tmp_path / "out")
        assert all(part in str(error.value) for part in parts), str(error.value)
        assert same_bits(was, other.state_dict())

    changed = deepcopy(base)
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight[3, 5] += 1e-3
    refused(changed, "model.layers.2.mlp.down_proj.weight: fingerprint ", "expected ")
    with pytest.raises(ValueError) as error:
        load_delta(changed, tmp_path / "out")
    assert "layers.0" not in str(error.value)
    refused(tiny("llama", seed=1)[0], "model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight")
    refused(tiny("gpt2")[0], "model.layers.0.mlp.down_proj.weight: the model has no such parameter")
    refused(deepcopy(base).bfloat16(), "bfloat16, expected float32; load the model with dtype=torch.float32")
    refused(model, "these edits are in it")


def test_every_damaged_byte_of_a_delta_is_noticed(edited, tmp_path):
    base, model, updates, originals = edited("llama", columns=(1,), layers=(0,))
    export.export_delta(model, updates, originals, tmp_path / "out", CARD)
    sound = (tmp_path / "out" / delta.FILE).read_bytes()
    header = int.from_bytes(sound[:8], "little") + 8
    file, unedited = tmp_path / "damaged.safetensors", down(base)
    padding = len(sound[:header]) - len(sound[:header].rstrip())
    for place in [*range(0, header - padding, 7), *range(header, len(sound), 499), len(sound) - 1]:
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(file))):
            load_delta(base, file)
    for size in (0, 5, header, len(sound) - 1):
        file.write_bytes(sound[:size])
        with pytest.raises(ValueError, match=re.escape(str(file))):
            load_delta(base, file)
    with pytest.raises(ValueError, match="there is no delta at"):
        load_delta(base, tmp_path)
    assert same_bits(down(base), unedited)


def test_a_delta_of_another_format_says_so(edited, tmp_path, monkeypatch):
    base, model, updates, originals = edited("llama")
    monkeypatch.setattr(delta, "_FORMAT", "easyedit_nmke delta 99")
    export.export_delta(model, updates, originals, tmp_path / "out", CARD)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"delta 99.*expected 'easyedit_nmke delta 2'"):
        load_delta(base, tmp_path / "out")


def test_updates_that_are_not_all_of_the_edits_are_refused(edited, tmp_path):
    base, model, updates, originals = edited("llama")
    unedited, wanted = down(base), down(model)
    with pytest.raises(RuntimeError, match=r"give model\.layers\.2\.mlp\.down_proj\.weight the fingerprint"):
        export.export_delta(model, updates[:-1], originals, tmp_path / "out", CARD)
    assert not list(tmp_path.iterdir()) and same_bits(down(model), wanted)
    delta.save_delta(tmp_path / delta.FILE, model, updates[:-1], originals, {"base": "some/model"})
    with pytest.raises(ValueError, match=r"give model\.layers\.2\.mlp\.down_proj\.weight the fingerprint"):
        load_delta(base, tmp_path)
    assert same_bits(down(base), unedited)


# ---- the adapter


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_gives_the_logits_of_the_edited_model(kind, edited, tmp_path):
    peft = pytest.importorskip("peft")
    base, model, updates, _ = edited(kind, spare=(2,))
    report = export.export_lora(model, updates, tmp_path / "out", CARD)
    assert report == (5, {0: 0.0, 2: 0.0}, 0.0)
    wanted, unedited = logits(model), logits(base)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    where = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(where) == 2  # the two edited layers' down projections and nothing else
    assert (logits(adapted) - wanted).abs().max() <= 1e-4 < (unedited - wanted).abs().max()
    assert (logits(adapted.merge_and_unload()) - wanted).abs().max() <= 1e-4


def test_the_adapter_is_named_as_servers_look_it_up(edited, tmp_path):
    names = {}
    for kind in FAMILIES:
        _, model, updates, _ = edited(kind)
        export.export_lora(model, updates, tmp_path / kind, CARD)
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 5 and config["layers_to_transform"] == [0, 2] and config["bias"] == "none"
        assert config["fan_in_fan_out"] == (kind == "gpt2") and config["base_model_name_or_path"] == "some/model"
        names[kind] = config["target_modules"]
    assert names == {"llama": ["down_proj"], "qwen2": ["down_proj"], "gpt2": ["mlp.c_proj"], "gptj": ["fc_out"]}
    stored = load_file(tmp_path / "llama" / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"].shape == (5, 96)
    assert stored["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"].shape == (32, 5)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_truncated_adapter_reports_what_it_costs(rank, edited, tmp_path):
    _, model, updates, _ = edited("llama", columns=(1, 4, 6), spare=(2,))
    report = export.export_lora(model, updates, tmp_path / "out", CARD, rank=rank)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    lost, whole = [], []
    for layer in (0, 2):
        change = sum(
            update.left.double() @ update.right.double() for update in updates if update.parameter.split(".")[2] == str(layer)
        )
        module = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        kept = stored[f"{module}.lora_B.weight"].double() @ stored[f"{module}.lora_A.weight"].double()
        best = torch.linalg.svdvals(change)[rank:].norm()
        lost.append((change - kept).norm())
        whole.append(change.norm())
        assert lost[-1] == pytest.approx(best.item(), rel=1e-4, abs=1e-5)
        assert report.errors[layer] == pytest.approx((lost[-1] / whole[-1]).item(), rel=1e-4, abs=1e-6)
    assert report.rank == rank
    assert report.total == pytest.approx((torch.stack(lost).norm() / torch.stack(whole).norm()).item(), rel=1e-4)
    assert f"it leaves out {report.total:.2%} of the updates" in (tmp_path / "out" / "README.md").read_text()


def test_ranks_are_rounded_up_to_those_that_are_served():
    asked = (1, 2, 8, 9, 300, 320, 321, 512, 600)
    assert [export.served_rank(rank) for rank in asked] == [1, 8, 8, 16, 320, 320, 512, 512, 600]


@pytest.mark.parametrize(("kind", "columns", "rank"), [("llama", (1, 3), 8), ("gpt2", (20, 20), 64), ("llama", (90,), 64)])
def test_an_adapter_is_filled_up_to_its_rank_with_zeros(kind, columns, rank, edited, tmp_path):
    """Also beyond the matrices' own rank of 32."""
    peft = pytest.importorskip("peft")
    base, model, updates, _ = edited(kind, columns=columns)
    report = export.export_lora(model, updates, tmp_path / "out", CARD, rank=rank, fill=True)
    assert report.rank == rank and report.total < 1e-12
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(rank == tensor.shape[0 if "lora_A" in name else 1] for name, tensor in stored.items())
    used = [tensor.any(dim=1 if "lora_A" in name else 0).sum().item() for name, tensor in stored.items()]
    assert used == [min(sum(columns), rank, 32) if sum(columns) > rank else sum(columns)] * 4
    wanted = logits(model)
    assert (logits(peft.PeftModel.from_pretrained(base, tmp_path / "out")) - wanted).abs().max() <= 1e-4


def test_more_edits_than_hidden_dimensions_need_no_higher_rank(edited, tmp_path):
    _, model, updates, _ = edited("llama", columns=(10,) * 4)
    report = export.export_lora(model, updates, tmp_path / "out", CARD)
    assert report.rank == 32 and report.total < 1e-12
    assert export.export_lora(model, updates, tmp_path / "more", CARD, rank=1000).rank == 32


@pytest.mark.parametrize(("given", "rank"), [(1, 1), (2, 5), (5, 2), (90, 7)])
def test_low_rank_factors_are_of_one_size(given, rank):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(33, given, generator=generator) * 100, torch.randn(given, 63, generator=generator) / 1e4
    if given == 2:
        left[:, 1], right[1] = 0, 0  # an edit that had nothing to do
    a, b, lost = export.low_rank(left, right, rank)
    assert a.shape == (33, rank) and b.shape == (rank, 63)
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1), rtol=1e-4, atol=1e-6)
    assert (a @ b - left @ right).norm().item() == pytest.approx(lost, rel=1e-3, abs=1e-4)


# ---- folders and cards


def exports(model, tok, updates, originals, folder):
    yield lambda: export.export_model(model, tok, folder, CARD)
    yield lambda: export.export_delta(model, updates, originals, folder, CARD)
    yield lambda: export.export_lora(model, updates, folder, CARD)


def test_a_failure_leaves_no_folder(edited, tiny, tmp_path, monkeypatch):
    _, model, updates, originals = edited("llama")
    folder = tmp_path / "deep" / "out"
    (tmp_path / "deep" / ".out.partial").mkdir(parents=True)  # left by a killed attempt
    (tmp_path / "deep" / ".out.partial" / "half").write_text("half")
    for what, go in enumerate(exports(model, tiny("llama")[1], updates, originals, folder)):
        with monkeypatch.context() as patch:
            patch.setattr(export, "_table", lambda rows: 1 / 0)  # the card, written last
            with pytest.raises(ZeroDivisionError):
                go()
            assert not list((tmp_path / "deep").iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                go()
            assert not list((tmp_path / "deep").iterdir())
        if what % 2:
            folder.mkdir()  # an empty one is taken
        go()
        assert (folder / "README.md").is_file() and not (folder / "half").exists()
        content = {file: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(ValueError, match="not an empty folder"):
            go()
        assert content == {file: file.read_bytes() for file in folder.iterdir()}
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_methods_without_factors_are_told_what_to_do(edited, tmp_path):
    _, model, _, originals = edited("llama")
    with pytest.raises(ValueError, match=r"FT.*--to model"):
        export.export_delta(model, [], originals, tmp_path / "out", CARD)
    with pytest.raises(ValueError, match=r"FT.*--to model"):
        export.export_lora(model, [], tmp_path / "out", CARD)
    with pytest.raises(ValueError, match="rank is 0"):
        export.export_lora(model, some_updates(model), tmp_path / "out", CARD, rank=0)
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_was_done(edited, tiny, tmp_path):
    _, model, updates, originals = edited("llama")
    for number, go in enumerate(exports(model, tiny("llama")[1], updates, originals, tmp_path / "out")):
        go()
        card = (tmp_path / "out" / "README.md").read_text()
        for part in ("base_model: some/model", "# some/model with 5 edits", "0123456789abcdef", "| Method | NMKE |", "2026-01-31"):
            assert part in card
        assert "| Edits | Rel | Gen |\n| --- | --- | --- |\n| 5 | 0.980 | - |" in card
        assert ("dtype=torch.float32" in card) and ("vllm serve some/model --enable-lora --max-lora-rank 8" in card) == (
            number == 2
        )
        (tmp_path / "out").rename(tmp_path / f"out{number}")
    assert "export with `--rank 512`" in export._serving("some/model", "out", 513)
    card = dataclasses.replace(CARD, base="my model")
    options = "--enable-lora --max-lora-rank 8 --lora-modules 'edited=my lora'"
    assert f"vllm serve 'my model' {options}" in export._serving(card, "my lora", 5)
    assert "vllm serve BASE" in export._serving(dataclasses.replace(CARD, base="atlas"), "out", 5)


# ---- in a process that knows nothing but the folders

FRESH = """
import re, sys
from pathlib import Path
import torch
from easyedit_nmke.scores import generation
prompts, found = Path("prompts.txt").read_text().splitlines(), {}
for kind in ("model", "delta", "lora"):
    names = {}
    exec(re.search("```python\\n(.*?)```", Path(kind, "README.md").read_text(), re.S)[1], names)
    model, tok = names["model"], names["tok"]
    tokens = torch.arange(36).view(3, 12) + 100
    with torch.no_grad():
        found[kind] = {"logits": model(tokens).logits, "answers": generation.greedy_texts(model, tok, prompts)}
    found[kind]["weights"] = {n.removeprefix("base_model.model."): p for n, p in model.state_dict().items()}
torch.save(found, "found.pt")
"""


def test_a_fresh_process_answers_as_the_edited_model(atlas, requests, nmke_hparams, tmp_path):
    """By the code on the cards: NMKE on the embedded model, calls of one and of two requests."""
    pytest.importorskip("peft")
    model, tok = atlas
    asked = requests(4)
    prompts = [request["prompt"] for request in asked]
    originals, unedited = before(model, (0, 1)), generation.greedy_texts(model, tok, prompts)
    hparams = nmke_hparams(model, tok, v_num_grad_steps=15)
    for batch in (asked[:1], asked[1:3], asked[3:]):
        methods.apply_nmke_to_model(model, tok, batch, hparams)
    updates = [update for made in model.nmke_state.events for update in made.updates]
    card = export.Card("atlas", "0", "NMKE", 4, "2026-01-31")
    export.export_model(model, tok, tmp_path / "model", card, dtype=torch.float32)
    export.export_delta(model, updates, originals, tmp_path / "delta", card)
    export.export_lora(model, updates, tmp_path / "lora", card)
    after = generation.greedy_texts(model, tok, prompts)
    assert unedited != after
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        wanted = model(torch.arange(36).view(3, 12) + 100).logits
        base = embedded.load()[0](torch.arange(36).view(3, 12) + 100).logits
    assert (base - wanted).abs().max() > 1e-2
    for kind, got in found.items():
        assert got["answers"] == after, kind
        assert (got["logits"] - wanted).abs().max() <= 1e-4, kind
    for kind in ("model", "delta"):
        assert same_bits(down(model, (0, 1)), {name: found[kind]["weights"][name] for name in down(model, (0, 1))}), kind
    assert Path(tmp_path / "delta" / delta.FILE).stat().st_size < 0.2 * sum(t.numel() * 4 for t in originals.values())


def test_a_delta_holds_every_kind_of_update_and_an_adapter_low_rank_ones_alone(tiny, tmp_path):
    model, base = tiny("llama")[0], tiny("llama")[0]
    view, generator = ModelView(model), torch.Generator().manual_seed(0)
    down0, up1 = view.weight_name(0), "model.layers.1.mlp.up_proj.weight"
    originals = {name: view.matrix(name).clone() for name in (down0, up1)}
    made = [
        LowRank(down0, torch.randn(32, 2, generator=generator), torch.randn(2, 96, generator=generator)),
        Sparse(down0, torch.tensor([0, 5, 3071]), torch.tensor([1.0, -2.0, 3.0])),
        LowRank(down0, torch.randn(32, 1, generator=generator), torch.randn(1, 96, generator=generator)),
        Dense(up1, torch.randn(96, 32, generator=generator)),
    ]
    for name in originals:
        accumulate(view.matrix(name), originals[name], of_parameter(made, name))
    export.export_delta(model, made, originals, tmp_path / "delta", CARD)
    load_delta(base, tmp_path / "delta")
    assert same_bits(base.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"the update of model.layers.0.mlp.down_proj.weight is sparse, and an adapter holds"):
        export.export_lora(model, made, tmp_path / "lora", CARD)
    assert not (tmp_path / "lora").exists()


def test_an_adapter_of_another_linear_layer(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    model, base = tiny("llama")[0], tiny("llama")[0]
    name, view = "model.layers.1.mlp.up_proj.weight", ModelView(model)
    made = LowRank(name, torch.randn(96, 2, generator=torch.Generator().manual_seed(0)) / 9, torch.ones(2, 32))
    accumulate(view.matrix(name), view.matrix(name), [made])
    export.export_lora(model, [made], tmp_path / "lora", CARD)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    assert torch.allclose(logits(adapted), logits(model), atol=1e-4)


@pytest.mark.parametrize("method", ["UltraEdit", "KNE", "LocFT-BF", "MEMIT"])
def test_edits_of_other_methods_travel_as_a_delta_and_low_rank_ones_as_an_adapter(tiny, settings, requests, tmp_path, method):  # noqa: F811
    options = {"LocFT-BF": {"keep_updates": True}, "MEMIT": {"blue": True, "batch_size": 2}}.get(method, {})
    (model, tok), (base, _) = tiny("llama"), tiny("llama")
    for some in (requests(2), requests(4)[2:]):
        methods.apply_to_model(model, tok, some, settings(method, model, tok, **options))
    originals, made = model.nmke_state.changes()
    export.export_delta(model, made, originals, tmp_path / "delta", CARD)
    load_delta(base, tmp_path / "delta")
    assert same_bits(base.state_dict(), model.state_dict())
    if method in ("UltraEdit", "MEMIT"):
        report = export.export_lora(model, made, tmp_path / "lora", CARD)
        assert report.rank > 4 if method == "UltraEdit" else report.rank == 4
    else:
        with pytest.raises(ValueError, match="an adapter holds low-rank updates"):
            export.export_lora(model, made, tmp_path / "lora", CARD)
