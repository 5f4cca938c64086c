"""Projections kept from edit to edit, the choice of a backend, and one edit's weights with every backend."""

import copy
import dataclasses
import math

import pytest
import torch
from test_attribution import make_case

from easyedit_nmke import NMKEHyperParams, apply_nmke_to_model, attribution
from easyedit_nmke.attribution import AttributionCache, cached, choose, fast, plain
from easyedit_nmke.methods.keys import attribution_inputs
from easyedit_nmke.models.arch import ModelView
from easyedit_nmke.models.updates import LowRank

SIZE = (3, 63, 33, 301)


def update(case, seed, size=1.0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    (hidden, neurons), dtype = case.w_out.shape, torch.promote_types(case.w_out.dtype, torch.float32)
    left = size * torch.randn(hidden, rank, generator=generator, dtype=dtype) / math.sqrt(hidden)
    return LowRank("0", left, torch.randn(rank, neurons, generator=generator, dtype=dtype))


class Log:
    """What was written to a case, as the cache is told of it."""

    def __init__(self, case):
        self.case, self.base, self.updates = case, case.w_out.clone(), []

    def edit(self, seed, size=1.0, wrong=1.0):
        """Write an update; `wrong`: and tell of another one."""
        change = update(self.case, seed, size)
        self.case.w_out.add_((change.left @ change.right).to(self.case.w_out))
        self.updates.append(change._replace(left=wrong * change.left))

    def after(self, count):
        if count == len(self.updates):
            return self.case.w_out
        weight = self.base.clone()
        for change in self.updates[:count]:
            weight.add_((change.left @ change.right).to(weight))
        return weight

    def projection(self, cache):
        made = cached.Made(self.base, self.updates[:], lambda left: left, self.after)
        return cache.projection(0, self.case.w_out, self.case.readout, made)

    def error(self, cache, norm="frozen"):
        """Of the scores, relative to the largest."""
        expected = self.case.scores(backend="reference", norm=norm)
        got = self.case.scores(backend="cached", norm=norm, projection=self.projection(cache))
        return float((got - expected).abs().max() / expected.abs().max())


# -- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-9), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("style", ["rms", "layer", "layer softcap", "rms bias"])
def test_it_follows_edits(style, dtype, tolerance):
    log, cache = Log(make_case(SIZE, style, dtype=dtype)), AttributionCache(drift=1.0)
    for seed in range(4):
        for norm in ("frozen", "exact"):
            assert log.error(cache, norm) < tolerance
        log.edit(seed)
    log.projection(cache)
    assert cache.layers[0].refreshes == 1 and cache.layers[0].width == 8


def test_small_changes_of_a_half_precision_cache_add_up():
    """Each is less than bfloat16 can add to U: written into U they would be lost."""
    case, cache = make_case((3, 63, 220, 301), "rms"), AttributionCache()
    log = Log(case)
    log.projection(cache)
    cache.layers[0].stored = cache.layers[0].stored.bfloat16()
    before = case.scores(backend="reference")
    for _ in range(25):
        log.edit(seed=5, size=0.008)
        log.projection(cache)
    moved = float((case.scores(backend="reference") - before).abs().max() / before.abs().max())
    assert cache.layers[0].refreshes == 1 and moved > 0.03 and log.error(cache) < 0.1 * moved


def test_it_is_computed_anew_every_few_edits():
    log, cache = Log(make_case(SIZE, "layer")), AttributionCache(refresh_every=3)
    seen = []
    for seed in range(8):
        log.projection(cache)
        seen.append((cache.layers[0].refreshes, cache.layers[0].width))
        log.edit(seed)
    assert seen == [(1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4), (3, 0), (3, 2)]
    assert "3 updates" in cache.layers[0].reason or "6 updates" in cache.layers[0].reason


def test_edits_taken_back_are_dropped():
    log, cache = Log(make_case(SIZE, "layer")), AttributionCache()
    kept = []
    for seed in range(3):
        log.projection(cache)
        kept.append(log.case.w_out.clone())
        log.edit(seed)
    log.case.w_out.copy_(kept[1])
    del log.updates[1:]
    assert log.error(cache) < 3e-5
    assert (cache.layers[0].refreshes, cache.layers[0].width) == (1, 2)
    log.edit(9)  # and it goes on from there
    assert log.error(cache) < 3e-5 and cache.layers[0].width == 4


def test_drift_is_measured_and_bounded():
    """What it is told is not quite what was written, as in half precision: the sampled words do not agree."""
    for wrong, refreshes in ((1.0, 1), (1.01, 2)):
        log, cache = Log(make_case(SIZE, "rms")), AttributionCache()
        log.projection(cache)
        log.edit(1, wrong=wrong)
        assert log.error(cache) < 3e-5
        assert cache.layers[0].refreshes == refreshes


def test_measured_drift_of_half_precision_is_its_rounding():
    case, cache = make_case((1, 200, 64, 301), "rms", dtype=torch.bfloat16), AttributionCache()
    drift = Log(case).projection(cache).measure(case.w_out, case.readout)
    assert 1e-3 < drift < 4e-3 < cached.DRIFT[torch.bfloat16]


def test_other_heads_and_shapes_are_not_mixed_up():
    case, cache = make_case(SIZE, "rms"), AttributionCache()
    Log(case).projection(cache)
    other = case.but_readout(head=case.readout.head.flip(0))
    assert Log(other).error(cache) < 3e-5
    assert Log(make_case((2, 10, 8, 37), "rms")).error(cache) < 3e-5


def test_too_little_memory_is_refused_with_the_amount():
    log = Log(make_case(SIZE, "rms"))
    with pytest.raises(MemoryError, match=r"needs 0\.00 GB more for 1 layer"):
        log.projection(AttributionCache(memory=63 * 301 * 4 - 1))
    log.projection(AttributionCache(memory=63 * 301 * 4))
    big = torch.empty(4096, 14336, dtype=torch.bfloat16, device="meta")
    readout = dataclasses.replace(log.case.readout, head=torch.empty(128256, 4096, device="meta"))
    with pytest.raises(MemoryError, match=r"needs 18\.39 GB more for 5 layer"):
        AttributionCache(memory=10 << 30).check(5, big, readout)


# -- fast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["frozen", "exact"])
@pytest.mark.parametrize("gain", [0.1, 4.0, 30.0])
def test_near_and_far_logits_together(gain, norm):
    """Some neurons stay within reach of the unperturbed logits, some do not, and each is summed its own way."""
    case = make_case((3, 63, 33, 301), "layer", gain=gain)
    case.coefficients[:, ::7] *= 20
    expected = case.scores(backend="reference", norm=norm)
    assert float((case.scores(backend="fast", norm=norm) - expected).abs().max()) < 2e-5 * max(1.0, gain)


def test_the_exact_norm_takes_a_sure_prediction_away():
    """The unperturbed logits are far apart, the perturbed ones near each other, through the norm and not through the values."""
    case = make_case((2, 63, 400, 301), "rms", gain=8.0)
    case = case.but(residual=0.1 * case.readout.head[case.target_ids])
    expected = case.scores(backend="reference", norm="exact", amplification=3000.0)
    assert float(expected.min()) < -10
    assert float((case.scores(backend="fast", norm="exact", amplification=3000.0) - expected).abs().max()) < 1e-3


@pytest.mark.parametrize("budget", [300_000, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_stays_within_its_budget(budget, dtype):
    """What torch allocates, as its profiler counts it, and the same numbers."""
    case = make_case((3, 200, 24, 700), "layer", dtype=dtype)
    args = (case.coefficients, case.residual, case.w_out, case.readout, case.target_ids, 30.0)
    for final in (None, case.final_hidden):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            got = fast.perturbed_log_probs(*args, final, budget=budget)
        live = peak = 0
        for event in sorted(
            (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
        ):
            live += event.nbytes()
            peak = max(peak, live)
        assert 0 < peak <= budget
        for a, b in zip(got, fast.perturbed_log_probs(*args, final), strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match="the budget is 1000"):
        fast.perturbed_log_probs(*args, None, budget=1000)


@pytest.mark.parametrize("norm", ["frozen", "exact"])
def test_the_plain_procedure_computes_the_same(norm):
    case = make_case((3, 200, 33, 301), "layer")
    final = case.final_hidden if norm == "frozen" else None
    args = (case.coefficients, case.residual, case.w_out, case.readout, case.target_ids, 30.0, final)
    for a, b in zip(plain.perturbed_log_probs(*args), fast.perturbed_log_probs(*args), strict=True):
        assert torch.allclose(a.double(), b, atol=1e-5)


# -- the choice --------------------------------------------------------------------------------------------------


def test_auto_says_why():
    case, cache = make_case(SIZE, "rms"), AttributionCache()
    assert choose("auto", case.w_out, case.readout) == ("fast", "CPU")
    assert choose("auto", case.w_out, case.readout, 2, cache) == ("cached", "CPU, 0.00015 GB are kept from edit to edit")
    assert choose("cached", case.w_out, case.readout, 2, cache) == ("cached", "named, CPU")
    cache.memory = 1
    assert choose("auto", case.w_out, case.readout, 2, cache) == ("fast", "CPU")
    with pytest.raises(MemoryError, match="2 layer"):
        choose("cached", case.w_out, case.readout, 2, cache)
    with pytest.raises(ValueError, match="no state"):
        choose("cached", case.w_out, case.readout)
    with pytest.raises(ValueError, match="projection"):
        case.scores(backend="cached")


# -- edits -------------------------------------------------------------------------------------------------------


def edits(tiny, settings_for, requests, weights, kind, backend, count=3):
    model, tok = tiny(kind)
    settings = settings_for(model, tok, attribution_backend=backend, solve="full")
    for request in requests(count):
        apply_nmke_to_model(model, tok, [request], settings)
    return model.nmke_state, weights(model, settings)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "olmo2"])
def test_edits_write_the_same_weights_with_every_backend(tiny, nmke_hparams, requests, weights, kind):
    state, expected = edits(tiny, nmke_hparams, requests, weights, kind, "reference")
    for backend in ("fast", "cached", "auto"):
        other, found = edits(tiny, nmke_hparams, requests, weights, kind, backend)
        for layer in expected:
            assert torch.equal(other.masks[layer], state.masks[layer])
            assert torch.equal(found[layer], expected[layer])
        names = [report.attribution.split(":")[0] for report in other.reports]
        assert names == ["cached" if backend == "auto" else backend] * 3
        if backend == "cached":
            assert other.attribution_cache.layers[0].refreshes == 1


def test_a_planted_error_changes_the_mask(tiny, nmke_hparams, requests, weights, monkeypatch):
    """A cache that does not follow the log would go unnoticed without this comparison."""
    state, _ = edits(tiny, nmke_hparams, requests, weights, "llama", "reference", 4)
    become = cached.Projection.become
    monkeypatch.setattr(cached.Projection, "become", lambda self, *args: None if self.refreshes else become(self, *args))
    other, _ = edits(tiny, nmke_hparams, requests, weights, "llama", "cached", 4)
    assert any(not torch.equal(other.masks[layer], state.masks[layer]) for layer in state.masks)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_cache_made_late_has_the_bits_of_one_that_followed(tiny, nmke_hparams, requests, monkeypatch, kind):
    """Whenever it is first asked for, and after an edit is undone: U and its pending columns depend on the log alone."""
    model, tok = tiny(kind)
    settings, seen = nmke_hparams(model, tok, attribution_backend="cached"), []
    monkeypatch.setattr(cached, "REFRESH_EVERY", 3)
    projection = AttributionCache.projection

    def compared(self, layer, w_out, readout, made):
        found = projection(self, layer, w_out, readout, made)
        if self.refresh_every != 2:
            late = projection(AttributionCache(refresh_every=self.refresh_every), layer, w_out, readout, made)
            for name in ("stored", "left", "right"):
                assert torch.equal(getattr(found, name), getattr(late, name))
            seen.append((layer, found.start, found.width, found.refreshes))
        return found

    monkeypatch.setattr(AttributionCache, "projection", compared)
    asked = requests(8)
    for number, request in enumerate(asked):
        apply_nmke_to_model(model, tok, [request], settings)
        state = model.nmke_state
        if number == 0:
            state.attribution_cache.refresh_every = 3
        if number == 5:
            state.undo(5)
    first = [row[1:] for row in seen if row[0] == 0]
    assert first == [(0, 0, 1), (0, 1, 1), (0, 2, 1), (3, 0, 2), (3, 1, 2), (3, 2, 2), (3, 2, 2), (6, 0, 3)]
    state.undo(1)  # of what U itself has seen
    apply_nmke_to_model(model, tok, [asked[4]], settings)
    assert seen[-2][1:] == (6, 0, 4)


def test_a_change_within_the_log_is_noticed_in_its_content(tiny, nmke_hparams):
    case, cache = make_case(SIZE, "rms"), AttributionCache()
    change, base = update(case, 1), case.w_out.clone()
    case.w_out.add_(change.left @ change.right)

    def made(change, base):
        return cached.Made(base, [change], lambda left: left, lambda count: base if count == 0 else case.w_out)

    first = cache.projection(0, case.w_out, case.readout, made(change, base))
    assert (first.refreshes, first.width) == (1, 2)
    again = change._replace(left=change.left.clone(), right=change.right.clone())
    assert cache.projection(0, case.w_out, case.readout, made(again, base.clone())).refreshes == 1
    cache.projection(0, case.w_out, case.readout, made(change, base + 0.001))
    assert first.refreshes > 1


def test_copies_of_a_model_do_not_copy_the_cache(tiny, nmke_hparams, requests, weights):
    state, _ = edits(tiny, nmke_hparams, requests, weights, "llama", "cached", 1)
    assert state.attribution_cache.layers and not copy.deepcopy(state).attribution_cache.layers


def test_mpc_needs_no_vocabulary(tiny, nmke_hparams, requests):
    model, tok = tiny("llama")
    apply_nmke_to_model(model, tok, requests(1), nmke_hparams(model, tok, attribution_strategy="mpc"))
    assert model.nmke_state.reports[0].attribution == "auto: MPC needs no vocabulary"


@pytest.mark.parametrize("position", ["last_token", "padded_end"])
def test_many_prompts_are_read_in_chunks(tiny, monkeypatch, position):
    model, tok = tiny("gptj")
    texts = ["The owner of it is " + "the " * n for n in (0, 3, 1, 9, 2)]
    view = ModelView(model)
    whole = attribution_inputs(view, tok, texts, [0, 1], position)
    monkeypatch.setattr("easyedit_nmke.methods.keys.ROWS_AT_A_TIME", 2)
    parts = attribution_inputs(view, tok, texts, [0, 1], position)
    assert torch.equal(whole.predicted, parts.predicted)
    assert torch.allclose(whole.final_hidden, parts.final_hidden, atol=1e-5)
    for layer in (0, 1):
        assert torch.allclose(whole.coefficients[layer], parts.coefficients[layer], atol=1e-5)
        assert torch.allclose(whole.residual[layer], parts.residual[layer], atol=1e-5)


def test_backends_are_the_hyperparameters_choices():
    choices = {f.name: f.metadata["choices"] for f in dataclasses.fields(NMKEHyperParams) if "choices" in f.metadata}
    assert set(choices["attribution_backend"]) == {"auto", *attribution.BACKENDS}
    assert set(choices["attribution_strategy"]) == set(attribution.STRATEGIES)
