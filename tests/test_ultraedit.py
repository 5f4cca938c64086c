"""UltraEdit against a plain version and EasyEdit's own, and what becomes of its statistics when edits are taken back."""

import copy
import importlib

import pytest
import test_easyedit as inside
import torch
import yaml
from test_easyedit_baselines import compare

from easyedit_nmke import LifelongEditor, methods
from easyedit_nmke.methods import read
from easyedit_nmke.methods.ultraedit import Statistics, UltraEditHyperParams, statistics_of, writes
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.prompts import target_tokens
from easyedit_nmke.models.requests import Request
from easyedit_nmke.models.updates import LowRank

easyeditor, known, edits = inside.easyeditor, inside.known, inside.edits

LLAMA = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]
GPT2 = ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"]


@pytest.fixture
def settings():
    def make(model, tok, **overrides):
        names = GPT2 if model.config.model_type == "gpt2" else LLAMA
        values = dict(model_name=(model, tok), layers=[0, 1], inner_params=names, device="cpu", lr=1e-2, batch_size=3)
        return UltraEditHyperParams(**{**values, **overrides})

    return make


class Plain:
    """One request after the other, one running mean and sum of squares for each shape, dense solves; float64."""

    def __init__(self, model, tok, chosen):
        self.model, self.tok, self.chosen, self.running = model, tok, chosen, {}

    def update(self, shape, x):
        n, mean, squares = self.running.get(shape, (0, 0, 0))
        delta = x.mean(0) - mean
        squares = squares + len(x) * x.var(0) + n * len(x) * delta**2 / (n + len(x))
        self.running[shape] = (n + len(x), mean + len(x) * delta / (n + len(x)), squares)

    def __call__(self, requests):
        model, tok, chosen = self.model, self.tok, self.chosen
        modules = {name: model.get_submodule(name) for name in chosen.inner_params}
        h, g = {name: [] for name in modules}, {name: [] for name in modules}
        for start in range(0, len(requests), chosen.batch_size_once):
            some = [Request.from_dict(r) for r in requests[start : start + chosen.batch_size_once]]
            seen, losses = {name: [] for name in modules}, []
            for request in some:
                pairs = zip(modules.values(), seen.values(), strict=True)
                handles = [m.register_forward_hook(lambda _, i, o, to=to: to.append((i[0], o))) for m, to in pairs]
                prompt = tok(request.prompt)["input_ids"]
                target = target_tokens(tok, request.prompt, request.target_new)
                said = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
                losses += [-said[len(prompt) - 1 + i, word] for i, word in enumerate(target)]
                for handle in handles:
                    handle.remove()
            for name in modules:
                gradients = torch.autograd.grad(torch.stack(losses).mean(), [o for _, o in seen[name]], retain_graph=True)
                h[name].append(torch.cat([i[0].detach().double() for i, _ in seen[name]]))
                g[name].append(torch.cat([one[0].double() for one in gradients]))
                self.update(tuple(modules[name].weight.shape), torch.cat([h[name][-1], g[name][-1]], 1))
        for name, module in modules.items():
            keys, gradients = torch.cat(h[name]), torch.cat(g[name])
            n, mean, squares = self.running[tuple(module.weight.shape)]
            std = (squares / (n - 1)).sqrt() + torch.finfo(torch.float32).eps
            hat, pseudo = ((torch.cat([keys, gradients], 1) - mean) / std).split([keys.shape[1], gradients.shape[1]], 1)
            v = -chosen.lr * hat.pow(2).sum(1, keepdim=True) * pseudo
            shift = torch.linalg.solve(keys.T @ keys + torch.eye(keys.shape[1]), keys.T @ v).float()
            module.weight.data += shift if type(module).__name__ == "Conv1D" else shift.T


def differs(model, other, start):
    return max(
        ((p - other.get_parameter(n)).norm() / (p - start[n]).norm()).item()
        for n, p in model.named_parameters()
        if not torch.equal(p, start[n])
    )


@pytest.mark.parametrize(("kind", "once"), [("llama", 1), ("llama", 2), ("gpt2", 2)])
def test_ultraedit_is_the_dense_solve_on_features_normalised_over_all_edits(tiny, settings, requests, kind, once):
    model, tok = tiny(kind)
    chosen = settings(model, tok, batch_size_once=once)
    start, other = {n: p.detach().clone() for n, p in model.named_parameters()}, copy.deepcopy(model)
    plain = Plain(other, tok, chosen)
    for some in (requests(3), requests(4)[3:], requests(6)[4:]):
        methods.apply_to_model(model, tok, some, chosen)
        plain(some)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert changed == {f"{name}.weight" for name in chosen.inner_params} and differs(model, other, start) < 1e-4
    assert model.nmke_state.last == 6 and all(p.grad is None for p in model.parameters())
    one, _ = tiny(kind)
    methods.apply_to_model(one, tok, requests(6), chosen)
    assert differs(one, other, start) > 1e-2, "normalised once for all, not batch after batch"


@pytest.mark.parametrize("together", [1, 2, 5])
def test_what_requests_add_sums_to_the_published_statistics(together):
    generator = torch.Generator().manual_seed(together)
    sizes = [3, 7, 2, 4, 5]
    x = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64) * 3 + 7
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))
    plain = Plain(None, None, None)
    for part in range(0, 5, together):
        plain.update("x", x[(owner >= part) & (owner < part + together)])
    n, mean, squares = plain.running["x"]
    found = Statistics(4)
    count, means, each = statistics_of(x, owner, together)
    found.append(torch.cat([count[None], means, each])[:, :2])
    rest = torch.cat([count[None], means, each])[:, 2:]
    got_mean, got_std = found.normal(rest)
    assert torch.allclose(got_mean, mean) and torch.allclose(got_std, (squares / (n - 1)).sqrt(), rtol=1e-6)
    assert found.count == 2, "asking adds nothing"
    found.append(rest)
    without = found.without([1, 3])
    expected = Statistics(4)
    expected.append(torch.cat([count[None], means, each])[:, [0]])
    expected.append(torch.cat([count[None], means, each])[:, [2, 4]])
    assert without.count == 3 and all(torch.allclose(a, b) for a, b in zip(without._sums, expected._sums, strict=True))
    found.truncate(1)
    assert found.count == 1 and torch.allclose(found._sums[1], x[:3].mean(0))
    found.truncate(0)
    assert found.count == 0 and not found.memory()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_go_on_from_disk_roll_back_and_lose_what_is_undone(tiny, settings, requests, tmp_path, dtype):
    def opened(folder):
        model, tok = tiny("llama")
        model.to(dtype)
        kept = {"state_dir": str(tmp_path / folder)} if folder else {}
        edited = LifelongEditor.from_hparams(settings(model, tok, lr=1e-3, batch_size_once=2, **kept))
        edited.open()
        return edited

    def now(editor):
        return {n: p.detach().clone() for n, p in editor.model.named_parameters()}

    def same(one, other):
        return all(torch.equal(p, other[n]) for n, p in one.items())

    first, whole = opened("state"), opened(None)
    for some in (requests(2), requests(3)[2:]):
        first.apply(some), whole.apply(some)
    first.close()
    again = opened("state")
    assert same(now(again), now(whole))
    after = now(again)
    again.apply(requests(5)[3:]), whole.apply(requests(5)[3:])
    assert same(now(again), now(whole)), "the statistics went on"
    for number, solver in whole.state.solvers.items():
        assert all(torch.equal(t, solver.memory()[n]) for n, t in again.state.solvers[number].memory().items())
        assert solver.memory()["keys"].dtype == torch.float32, "not rounded to the weights' dtype"
    again.state.rollback(3)
    assert same(now(again), after)
    again.apply(requests(5)[3:])
    assert same(now(again), now(whole)), "nor did they keep what was rolled back"
    again.undo(2)
    assert [solver.count for solver in again.state.solvers.values()] == [4, 4] and not same(now(again), now(whole))
    again.close()
    assert same(now(opened("state")), now(again))


def test_one_of_a_batch_is_undone_by_its_own_tokens(tiny, settings, requests):
    model, tok = tiny("llama")
    edited = LifelongEditor.from_hparams(settings(model, tok))
    edited.apply(requests(3))
    (edit,) = edited.state.log
    update, start = edit.updates[0], edited.state.weights.bases[0][2]
    assert update.requests == 3 and update.left.shape[1] > 9 and edit.separable
    edited.undo(2)
    kept = update.owner != 1
    expected = start[update.parameter] + update.left[:, kept] @ update.right[kept]
    assert torch.allclose(model.get_parameter(update.parameter), expected, atol=1e-5)
    assert update.without({0, 1, 2}) is None and update.without({5}) is update
    first = update._replace(first=7).without({7, 9})
    assert first.owner.unique().tolist() == [1] and LowRank("w", torch.ones(2, 3), torch.ones(3, 2)).requests == 3


def test_a_frozen_model_is_edited_too(tiny, settings, requests):
    (model, tok), (frozen, _) = tiny("llama"), tiny("llama")
    frozen.requires_grad_(False)
    for one in (model, frozen):
        methods.apply_to_model(one, tok, requests(2), settings(one, tok))
    assert all(torch.equal(p, frozen.get_parameter(n)) for n, p in model.named_parameters())
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in model.parameters())


def test_easyedits_files_load_and_wrong_modules_are_named(tiny, settings, tmp_path):
    content = {"alg_name": "ULTRAEDIT", "model_name": "atlas", "inner_params": LLAMA, "lr": "1e-6", "half": True, "silent": False}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(content))
    found = read(tmp_path / "theirs.yaml")
    assert type(found) is UltraEditHyperParams and (found.layers, found.lr, found.alg_name) == ([0, 1], 1e-6, "UltraEdit")
    for wrong, message in ((["model.layers"], "inner_params must be a list"), (None, "inner_params must be a list")):
        with pytest.raises(ValueError, match=message):
            UltraEditHyperParams(layers=[0], model_name="atlas", inner_params=wrong)
    with pytest.raises(ValueError, match=r"layers is \[3\], but inner_params names modules of \[0, 1\]"):
        UltraEditHyperParams(layers=[3], model_name="atlas", inner_params=LLAMA)
    model, tok = tiny("llama")
    chosen = settings(model, tok, layers=[1], inner_params=[])
    assert writes(ModelView(model), chosen) == [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")]
    for name in ("model.layers.0.mlp.gate", "model.layers.0.input_layernorm"):
        chosen = settings(model, tok, layers=[0], inner_params=[name])
        with pytest.raises(ValueError, match=f"inner_params names {name}, which is no linear module"):
            methods.open_state(model, tok, chosen)


@pytest.mark.easyedit
@pytest.mark.parametrize(("family", "once"), [("atlas", 1), ("llama", 1), ("llama", 2)])
def test_easyedits_own(easyeditor, known, edits, family, once, record_property):
    """With a tokenizer that puts no token of its own in front, which EasyEdit would train as the first of every target; and in
    parts of more than one request with targets of one length, since it trains the padding of shorter ones."""
    model, tok = known(family)
    plain = copy.deepcopy(tok)
    plain.backend_tokenizer.post_processor = importlib.import_module("tokenizers").processors.ByteLevel(trim_offsets=False)
    plain.padding_side = "left"
    if once > 1:
        lengths = [len(plain(" " + edit["target_new"])["input_ids"]) for edit in edits]
        edits = [edit for edit, length in zip(edits, lengths, strict=True) if length == max(set(lengths), key=lengths.count)]
    size = 2
    chosen = UltraEditHyperParams(
        layers=[0, 1], model_name=(model, plain), inner_params=LLAMA, device="cpu", lr=1e-3, batch_size=size, batch_size_once=once
    )
    other = copy.deepcopy(model)
    theirs = importlib.import_module("easyeditor.models.ultraedit")
    settings = theirs.UltraEditHyperParams(
        "ULTRAEDIT", inside.NAMES[family], "", "", "", list(LLAMA), "cpu", 0.0, None, size, 1e-3, "mask", once, 1024, True, "."
    )
    executor = theirs.UltraEditRewriteExecutor()

    def apply(some):
        with torch.enable_grad():
            executor.apply_to_model(other, plain, some, settings)
        executor.is_init = True  # EasyEdit would begin its statistics anew at every call: it never says that it has begun

    batches = [edits[i : i + size] for i in range(0, len(edits) - size + 1, size)][:3]
    worst = compare(model, other, lambda some: methods.apply_to_model(model, plain, some, chosen), apply, batches, record_property)
    assert len(batches) > 1 and worst < 1e-4
