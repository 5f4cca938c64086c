"""nmke bench: it runs through on a tiny shape, compares what was written, and says what it could not measure."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from easyedit_nmke import atlas, bench, cli, facts
from easyedit_nmke.bench import engines, machine, parts, shapes
from easyedit_nmke.methods.solver import NullSpaceSolver
from easyedit_nmke.models import gguf
from easyedit_nmke.models.prompts import encode, target_tokens

TINY = shapes.Shape("llama", shapes._llama("llama", 32, 96, 4, 4, 2, 700), (0, 1))
TINY_GPT2 = shapes.Shape("gpt2", dict(n_embd=32, n_layer=4, n_head=4, n_positions=128, vocab_size=700), (0, 1), "gpt2-xl")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setitem(shapes.SHAPES, "tiny-gpt2", TINY_GPT2)
    settings = shapes.settings_of
    monkeypatch.setattr(shapes, "settings_of", lambda shape: {**settings(shape), "v_num_grad_steps": 4})


@pytest.fixture
def alone(monkeypatch):
    """As where there is no checkout of EasyEdit."""

    def absent(*_):
        raise ImportError("EasyEdit was not found")

    monkeypatch.setattr(bench, "EasyEdit", absent)


def test_a_trained_model_is_measured_with_its_own_weights_and_facts_of_the_real_world(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "trained", shapes.Shape("llama", {}, (0, 1), "atlas", model="atlas"))
    bed, (model, _) = shapes.build("trained", 2, None, "cpu", torch.float32), atlas.load()
    assert torch.equal(bed.view.w_out(0), model.model.layers[0].mlp.down_proj.weight) and bed.layers == [0, 1]
    assert [request.prompt for request in bed.requests] == [record["prompt"] for record in facts.requests(2, "test", 0)]
    with pytest.raises(ValueError, match="trained is a trained one"):
        shapes.build("trained", 2, 3, "cpu", torch.float32)


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_the_shape_of_a_real_model_is_that_models(name):
    try:
        gguf.find(name)
    except ValueError as error:
        pytest.skip(str(error))
    bed = shapes.build(name, 1, None, "cpu", torch.float32)
    assert parts.sizes(name) == (*bed.view.w_out(0).shape, len(bed.view.head.weight))
    assert bed.view.depth == shapes.SHAPES[name].config["num_hidden_layers"]
    assert bed.model.config.model_type == shapes.SHAPES[name].model_type


def test_many_at_once_and_values_that_stop_early_are_measured_beside_single_edits(monkeypatch, alone):
    monkeypatch.setitem(shapes.SHAPES, "trained", shapes.Shape("llama", {}, (0, 1), "atlas", model="atlas"))
    content = bench.measure(bench.Plan("trained", 1, (0, 4), batch=3))
    made = {(result["engine"], result["at"]): result for result in content["results"]}
    together, apart = made["AlphaEdit, 3 at once", 0], made["AlphaEdit, 3 at once, values alone", 0]
    assert 0 < apart["difference"]["weights"] < 1e-4 and together["difference"] is None
    assert ("AlphaEdit, 3 at once", 4) not in made and ("AlphaEdit, stops at 0.95", 4) in made
    with pytest.raises(ValueError, match="a batch of 9"):
        bench.engines_for(shapes.build("tiny", 1, None, "cpu", torch.float32), batch=9)


def by_engine(content, count):
    return {r["engine"]: r for r in content["results"] if r["at"] in (count, None)}


def test_a_tiny_shape_runs_through_with_table_and_json(alone, tmp_path, capsys):
    out = tmp_path / "deep" / "bench.json"
    assert cli.main(["bench", "--shape", "tiny", "--edits", "2", "--at", "9,2,9", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["plan"]["at"] == [2, 9] and content["command"].startswith("nmke bench --shape tiny")
    assert {"cpu", "cores", "threads", "gpus"} <= set(content["hardware"]) and content["versions"]["torch"]
    results = by_engine(content, 2)
    assert {"NMKE, fast", "AlphaEdit", "MEMIT", "NMKE, plain", "AlphaEdit, plain"} <= set(results)
    assert set(by_engine(content, 9)) >= {"NMKE, fast", "AlphaEdit", "AlphaEdit, plain"}
    for name, result in results.items():
        assert result["edits"] == (1 if "plain" in name else 2)
        assert (
            {"values", "keys", "solve", "apply", "evaluate"}
            <= set(result["seconds"])
            == set(result["memory_mb"]) | {"rest"} - ({"rest"} if "plain" in name else set())
        )
        assert 0 < result["total"]["min"] <= result["total"]["median"] <= result["total"]["max"]
        inside = sum(part["median"] for phase, part in result["seconds"].items() if phase != "evaluate")
        assert result["edits"] > 1 or inside == pytest.approx(result["total"]["median"], rel=1e-6)
        assert result["times_faster"] is None
    assert "attribution" in results["NMKE, fast"]["seconds"]
    assert results["NMKE, plain"]["difference"]["masked"] < 1e-4 and results["AlphaEdit, plain"]["difference"]["weights"] < 1e-4
    assert "without EasyEdit's AlphaEdit: EasyEdit was not found" in printed and "random weights" in printed
    assert content["once"]["templates"]["this package"]["seconds"] > 0
    lines = printed.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("engine"))
    table = lines[head : lines.index("", head)]
    assert len(table) == 1 + len(content["results"]) and len({len(line) for line in table}) == 1, printed


def test_a_wrong_update_shows(alone, monkeypatch):
    right = NullSpaceSolver.directions
    monkeypatch.setattr(NullSpaceSolver, "directions", lambda self, *args: right(self, *args) * 1.001)
    results = by_engine(bench.measure(bench.Plan("tiny", 1, (3,))), 3)
    assert 0.9e-3 < results["AlphaEdit, plain"]["difference"]["weights"] < 5e-3
    headings, body = bench.rows({"results": list(results.values())})
    (row,) = [row for row in body if row[0] == "AlphaEdit, plain"]
    assert row[headings.index("weights")] == "1e-03"


def test_a_wrong_mask_shows():
    ours = {0: torch.ones(2, 4)}, {0: torch.tensor([True, True, False, True])}
    theirs = {0: torch.tensor([[1.0, 1, 0, 1], [1, 1, 0, 1]])}, {0: torch.tensor([True, True, True, True])}
    found = bench._compare(ours, theirs)
    assert found["masks"] == 0.25 and found["masked"] == 0 and found["weights"] > 0.5


def test_an_engine_that_fails_is_left_out_and_said(alone, monkeypatch):
    def fail(self, request):
        if self.count:
            raise RuntimeError("out of memory")
        return machine.Clock().measured()

    monkeypatch.setattr(bench.Plain, "edit", fail)
    content = bench.measure(bench.Plan("tiny", 1, (0, 4)))
    assert "AlphaEdit, plain failed with 4 past edits: out of memory" in content["notes"]
    assert set(by_engine(content, 4)) >= {"NMKE, fast", "AlphaEdit"} and "AlphaEdit, plain" not in by_engine(content, 4)


def test_weights_that_are_not_finite_are_no_result(alone, monkeypatch):
    right = engines.Plain._solve
    monkeypatch.setattr(engines.Plain, "_solve", lambda self, *args: right(self, *args) * float("nan"))
    content = bench.measure(bench.Plan("tiny", 1, (4,)))
    assert "AlphaEdit, plain failed with 4 past edits: the edited weights are not finite" in content["notes"]


def test_every_measurement_starts_from_the_same_weights_and_past_keys(alone):
    bed = shapes.build("tiny", 2, None, "cpu", torch.float32)
    made, _ = bench.engines_for(bed)
    original = {name: p.clone() for name, p in bed.model.named_parameters()}
    for engine in made:
        engine.prepare(7)
        first, second, third = (bench._edit(bed, engine, bed.requests[i])[1] for i in (0, 1, 0))
        assert any(update.any() for update in first.values())
        for layer in bed.layers:
            torch.testing.assert_close(first[layer], third[layer], rtol=0, atol=1e-7)
            assert not torch.equal(first[layer], second[layer])
    assert all(torch.equal(p, original[name]) for name, p in bed.model.named_parameters())


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--shape", "huge"], "no shape 'huge'; known: llama3-8b"),
        (["--part", "values"], "no part 'values'; known: solve, attribution"),
        (["--part", "solve", "--shape", "atlas"], "the parts are measured at the size of llama3-8b"),
        (["--part", "solve", "--neurons", "5"], "the number of neurons"),
        (["--part", "solve", "--layers", "5"], "--layers goes with whole edits"),
        (["--part", "solve", "--batch", "5"], "--batch goes with whole edits"),
        (["--neurons", "5"], "--neurons goes with --part attribution"),
        (["--shape", "atlas", "--layers", "3"], "atlas is a trained one"),
        (["--shape", "tiny", "--layers", "9"], "--layers is 9, expected 2 to 4"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_what_cannot_be_measured_is_said_first(argv, said, capsys):
    assert cli.main(["bench", "--device", "cpu", *argv]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("at", [(), (5, 5), (9, 2), (-1, 2)])
def test_numbers_of_past_edits_increase(at):
    with pytest.raises(ValueError, match="in increasing order"):
        bench.Plan("tiny", at=at)


def test_a_number_of_past_edits_is_a_number(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--at", "1,many"])
    assert "'many' is not a whole number" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda _: 100_000)
    with pytest.raises(ValueError, match="GB are free on cpu; give --layers with less than 4 blocks"):
        shapes.build("tiny", 1, None, "cpu", torch.float32)


def test_fewer_blocks_are_said():
    bed = shapes.build("tiny", 1, 2, "cpu", torch.float32)
    assert bed.view.depth == 2 and bed.layers == [0]
    assert "only 2 of 4 blocks, 1 edited" in " ".join(bed.notes)


def test_the_tokenizer_has_the_vocabulary_and_knows_the_requests():
    tok = shapes.word_tokenizer(50257)
    assert len(tok) == 50257
    request = next(shapes.synthetic_requests(50257, 3))
    texts = [request.prompt, f"{request.subject} is a", request.rephrase_prompt, f"The x. {request.prompt} {request.target_new}"]
    assert all(tok.unk_token_id not in encode(tok, text) for text in texts[:3])
    assert len(encode(tok, request.subject)) == 3 and len(target_tokens(tok, request.prompt, request.target_new)) == 2
    assert tok.decode(encode(tok, request.prompt)) == request.prompt


def test_past_keys_are_correlated_and_a_longer_list_starts_alike():
    short, long = (shapes.synthetic_keys(4000, n, 0.9, torch.Generator().manual_seed(1)) for n in (5, 40))
    assert torch.equal(short, long[:, :5])
    unit = long / long.norm(dim=0)
    cosines = (unit.T @ unit)[~torch.eye(40, dtype=bool)]
    assert abs(cosines.mean() - 0.9) < 0.02 and abs(long.norm(dim=0).mean() - 1) < 0.05


def test_phases_exclude_each_other(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(now))
    clock = machine.Clock()
    with clock.phase("outer"), clock.phase("inner"):
        pass
    assert clock.seconds == {"outer": 2, "inner": 1} and clock.measured().total == 3


def test_a_busy_machine_is_said():
    result = {"processor": {"median": 0.2}, "total": {"median": 1.0}}
    assert "20% of one core" in machine.busy([result], torch.device("cpu"))[0]
    assert not machine.busy([{**result, "processor": {"median": 1.9}}], torch.device("cpu"))


def test_the_solve_alone(capsys):
    assert cli.main(["bench", "--part", "solve", "--shape", "tiny", "--edits", "2", "--at", "3,40", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("this package") == 2 and "dense float32" in printed and "equation" in printed
    content = parts.solve("tiny", (3, 40), 2)
    assert all(r["equation"] < 1e-5 for r in content["results"]) and content["results"][-1]["difference"] < 1e-4


def test_a_wrong_solve_shows(monkeypatch):
    right = NullSpaceSolver.directions
    monkeypatch.setattr(NullSpaceSolver, "directions", lambda self, *args: right(self, *args) * 1.001)
    *ours, dense = parts.solve("tiny", (3, 40), 1)["results"]
    assert all(r["equation"] > 0.9e-3 for r in ours) and dense["equation"] < 1e-4 and dense["difference"] > 0.9e-3


def test_the_attribution_alone(monkeypatch, capsys):
    arguments = ["--part", "attribution", "--shape", "tiny", "--neurons", "50", "--edits", "1", "--device", "cpu"]
    assert cli.main(["bench", *arguments]) == 0
    assert "prompt by prompt" in capsys.readouterr().out
    content = parts.attribution("tiny", 1, 50)
    plain, fast = content["results"][:2]
    assert plain["engine"].startswith("prompt by prompt") and fast["engine"] == "fast"
    assert fast["difference"] < 1e-3 and fast["peak_tflops"] > 0 and (content["neurons"], content["words"]) == (50, 700)
    right = parts.per_prompt
    monkeypatch.setattr(parts, "per_prompt", lambda *args: right(*args[:3], args[3], args[4].roll(1), *args[5:]))
    assert parts.attribution("tiny", 1, 50)["results"][1]["difference"] > 1e-2


@pytest.mark.easyedit
@pytest.mark.parametrize("shape", ["tiny", "tiny-gpt2"])
def test_easyedit_side_by_side(shape, monkeypatch):
    try:
        importing = engines.easyedit_method("AlphaEdit")
    except ImportError as error:
        pytest.skip(str(error))
    assert importing[0] == "AlphaEdit"
    content = bench.measure(bench.Plan(shape, 2, (1, 20)))
    for count in (1, 20):
        results = by_engine(content, count)
        theirs = results["EasyEdit's AlphaEdit"]
        assert theirs["edits"] == 2 and theirs["times_faster"] == 1 and theirs["difference"]["weights"] < 1e-4
        assert {"values", "keys", "solve", "apply", "evaluate"} == set(theirs["seconds"])
        assert results["AlphaEdit"]["times_faster"] > 0
    assert by_engine(content, 1)["EasyEdit's MEMIT"]["difference"]["weights"] < 1e-4
    assert content["once"]["templates"]["EasyEdit's AlphaEdit"]["seconds"] > 0
    right = NullSpaceSolver.directions
    monkeypatch.setattr(NullSpaceSolver, "directions", lambda self, *args: right(self, *args) * 1.001)
    wrong = by_engine(bench.measure(bench.Plan(shape, 1, (20,))), 20)
    assert wrong["EasyEdit's AlphaEdit"]["difference"]["weights"] > 0.9e-3


def test_keys_that_are_held_are_all_counted(monkeypatch):
    monkeypatch.setattr(parts, "Clock", lambda: SimpleNamespace(phase=lambda name: nullcontext(), memory={"hold": 2.5}))
    monkeypatch.setattr(parts, "update_with", lambda *_: None)
    monkeypatch.setattr(parts, "_summary", lambda runs: {"processor": {"median": 1.0}, "total": {"median": 1.0}})
    monkeypatch.setattr(parts, "_dense", lambda *_: (None, torch.ones(1, 1)))
    monkeypatch.setattr(parts, "_equation", lambda *_: 0.0)
    *ours, _ = parts.solve("tiny", (3, 1234), 1)["results"]
    assert [(r["at"], r["held_mb"]) for r in ours] == [(3, 2.5), (1234, 5.0)] and parts._short(1234) == "1234"


def test_a_measurement_without_results_says_why(monkeypatch):
    monkeypatch.setattr(bench, "engines_for", lambda *_: ([], ["without AlphaEdit: out of memory"]))
    with pytest.raises(ValueError, match=r"nothing could be measured; .*without AlphaEdit: out of memory"):
        bench.measure(bench.Plan("tiny", 1, (1,), None, "cpu", "float32"))
    assert machine.busy([], torch.device("cuda")) == machine.busy([], torch.device("cpu")) == []
