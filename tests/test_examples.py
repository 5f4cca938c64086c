"""Every script for sequential editing runs, on the embedded model, with two records of the data that it is for."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from easyedit_nmke import atlas

HOME = Path(__file__).parents[1]
FOLDER, DATA = HOME / "examples" / "sequential", HOME / "tests" / "data"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "streams")
METHODS = {
    "NMKE": dict(layers=[0, 1], v_num_grad_steps=2, mom2_dataset="atlas", mom2_n_samples=200, nullspace_fraction=0.9),
    "LocFT-BF": dict(layers=[1], num_steps=2, lr=0.001),
    "UltraEdit": dict(inner_params=["model.layers.2.mlp.up_proj"], batch_size_once=2, lr=0.001),
}
# Script -> its data, a method where it is not NMKE, and scores that it has beside the usual ones.
CASES = {
    "zsre": (DATA / "zsre_100.json", "NMKE", {"loc"}),
    "counterfact": (DATA / "counterfact_original.json", "NMKE", {"efficacy_success", "counterfact_score"}),
    "knowedit": (DATA / "knowedit_wiki.json", "NMKE", {"portability Reasoning", "locality Relation_Specificity"}),
    "wikibigedit": (DATA / "wikibigedit.json", "NMKE", {"rel, tenth 10", "multi_hop"}),
    "mquake": (DATA / "mquake.json", "NMKE", {"multi_hop"}),
    "hallucination": (DATA / "counterfact_100.json", "LocFT-BF", {"perplexity before", "perplexity after"}),
    "in_batches": (DATA / "zsre_100.json", "UltraEdit", {"seconds an edit"}),
    "said_freely": (DATA / "counterfact_100.json", "NMKE", {"rel exact", "gen contains"}),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """settings(method) -> a file of quick settings of the embedded model; the covariance is made once."""
    folder = tmp_path_factory.mktemp("settings")

    def write(method):
        common = {"alg_name": method, "model_name": "atlas", "device": "cpu"}
        statistics = {"stats_dir": str(folder / "stats")} if method == "NMKE" else {}
        (folder / f"{method}.yaml").write_text(yaml.safe_dump({**common, **statistics, **METHODS[method]}))
        return str(folder / f"{method}.yaml")

    return write


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))  # as python does for the script it is given
    yield importlib.import_module
    for name in (*SCRIPTS, "streams"):
        sys.modules.pop(name, None)


def test_every_script_has_a_case_and_a_row():
    assert list(CASES) and sorted(CASES) == SCRIPTS
    assert all(f"| `{name}.py` |" in (FOLDER / "README.md").read_text() for name in SCRIPTS)


@pytest.mark.parametrize("name", CASES)
def test_a_script_edits_and_scores(name, script, settings, tmp_path, capsys):
    source, method, own = CASES[name]
    argv = ["--hparams", settings(method), "--data", str(source), "--edits", "2", "--out", str(tmp_path / "out.json")]
    script(name).main(argv)
    printed, content = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    scores = {key: value for key, value in content["scores"].items() if value is not None}
    assert {"rel_at_once", "rel", *own} <= scores.keys()
    told = {line[:44].strip(): float(line[44:]) for line in printed.splitlines()}
    assert told == {key: pytest.approx(value, abs=5e-4) for key, value in scores.items()}
    assert len(content["metrics"]) == 2 and all({"pre", "post", "final"} <= set(edit) for edit in content["metrics"])


def test_edits_take_and_the_last_scores_are_of_all(script, settings, tmp_path, capsys):
    """On facts that the embedded model knows, with enough steps."""
    (tmp_path / "facts.json").write_text(json.dumps([*atlas.requests(2), {**atlas.requests(3)[2], "subject": "Nobody"}]))
    content = yaml.safe_load(Path(settings("NMKE")).read_text()) | {"v_num_grad_steps": 12, "v_lr": 1.0, "neurons": "all"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    script("zsre").main(["--hparams", str(tmp_path / "mine.yaml"), "--data", str(tmp_path / "facts.json")])
    told = capsys.readouterr()
    assert float(dict(line.rsplit(None, 1) for line in told.out.splitlines())["rel"]) == 1 and "left out: record 2: " in told.err


def test_what_is_wrong_is_one_sentence(script, settings, capsys):
    for argv, said in (
        (["--hparams", settings("NMKE"), "--data", "no.json"], "there is no file no.json"),
        (["--hparams", "no.yaml", "--data", "no.json"], "no.yaml"),
    ):
        with pytest.raises(SystemExit):
            script("zsre").main(argv)
        assert said in capsys.readouterr().err.splitlines()[-1]
