"""What another package adds by entry points, from one file: a score that every table and figure shows, and a verb."""

import json
import subprocess
import sys

import pytest
import yaml

from easyedit_nmke import cli
from easyedit_nmke.scores import table

TOY = '''
from easyedit_nmke.cli.verb import Verb, positive
from easyedit_nmke.scores.table import Metric


def longest(model, tok, requests, before):
    """Characters of the longest new answer; none of a single request."""
    assert len(requests) == len(before) and "rewrite_acc" in before[0] and model.config.model_type == "llama" and tok is not None
    return max(len(request.target_new) for request in requests) if len(requests) > 1 else None


LONGEST = Metric(
    "Longest <answer>", short="Longest", column="Longest", what="characters of the longest new answer", better="lower", share=False,
    said="has {:.0f} characters to say", measure=longest,
)


def arguments(parser):
    parser.add_argument("times", type=positive)


def shout(args, console):
    if args.times > 9:
        raise ValueError("the voice is gone; shout less often")
    console.print("HO " * args.times + args.command)
    return 0


SHOUT = Verb("shout", "say it loud", "nmke shout 3", shout, arguments, needs_arguments=True)
LOUD = Verb("loud", "the same option twice", "nmke loud", shout, lambda parser: parser.add_argument("-v"))
EXPORT = Verb("export", "a name that is taken", "nmke export", shout)
WORDS = "neither a metric nor a verb"
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """outside(group, "name = value", ...): an installed package `toys` with these entry points of easyedit_nmke.<group>."""

    def install(group, *points):
        home = tmp_path / "toys"
        information = home / "toys-1.0.dist-info"
        information.mkdir(parents=True, exist_ok=True)
        (home / "toys_of_test.py").write_text(TOY)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[easyedit_nmke.{group}]\n" + "\n".join(points) + "\n")
        monkeypatch.syspath_prepend(str(home))

    yield install
    sys.modules.pop("toys_of_test", None)


def test_a_metric_from_outside_is_in_the_results_and_in_every_table_and_figure(outside, tmp_path, requests, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from easyedit_nmke.experiments import figures, report

    monkeypatch.setenv("COLUMNS", "200")
    outside("metrics", "longest = toys_of_test:LONGEST")
    asked = requests(2)
    (tmp_path / "data.json").write_text(json.dumps(asked))
    settings = {"alg_name": "FT", "model_name": "atlas", "device": "cpu", "layers": [1], "num_steps": 1}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    argv = ["run", "--hparams", tmp_path / "settings.yaml", "--data", tmp_path / "data.json", "--out", tmp_path / "out"]
    assert cli.main([*map(str, argv), "--checkpoints", "1,2"]) == 0
    shown = capsys.readouterr().out
    lines, _ = report.read(tmp_path / "out")
    wanted = float(max(len(request["target_new"]) for request in asked))
    assert [line["scores"]["longest"] for line in lines] == [wanted, None, wanted]
    assert "Longest" in shown and f"{wanted:.2f}" in shown and "Failed" not in shown

    assert cli.main(["report", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "Longest" in shown and f"has {wanted:.0f} characters to say" in shown
    headings, body = report.rows(lines, 2)
    assert body[-1][1][headings.index("Longest ↓")] == (f"{wanted:.2f}", "")
    assert "| Longest ↓ |" in report.markdown(lines, 2).splitlines()[0]
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "<th>Longest&nbsp;↓</th>" in page and "Longest: characters of the longest new answer" in page
    drawn = {ax.get_title("left"): ax for ax in figures.curves(report.frame(lines), ["FT"]).axes}
    assert drawn["Longest <answer> ↓"].get_lines()[0].get_ydata() == pytest.approx([wanted])


def test_what_a_metric_gives_must_be_a_number(outside, monkeypatch):
    outside("metrics", "longest = toys_of_test:LONGEST")
    import toys_of_test

    bad = table.Metric("Bad", measure=lambda *_: "high")
    monkeypatch.setattr(toys_of_test, "LONGEST", bad)
    with pytest.raises(ValueError, match="the metric 'longest' measured 'high', expected a number or None"):
        table.measured(None, None, [], [])


def test_a_verb_from_outside_has_help_arguments_and_errors_like_the_others(outside, capsys):
    outside("verbs", "shout = toys_of_test:SHOUT")
    assert cli.main(["shout", "2"]) == 0
    assert capsys.readouterr().out.strip() == "HO HO nmke shout 2"
    assert cli.main(["shout", "10"]) == 1
    assert capsys.readouterr().err == "nmke shout: the voice is gone; shout less often\n"
    assert cli.main(["shout"]) == 2
    assert "for example:\n  nmke shout 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert "say it loud" in out and "  nmke shout 3" in out


@pytest.mark.parametrize(
    "group, point, said",
    [
        ("verbs", "gone = toys_of_test:GONE", "'gone' (toys_of_test:GONE) of toys could not be loaded (AttributeError"),
        ("verbs", "gone = no_such_module:VERB", "could not be loaded (ModuleNotFoundError"),
        ("verbs", "export = toys_of_test:EXPORT", "takes a name of verbs that is there already"),
        ("verbs", "words = toys_of_test:WORDS", "the verb 'words' of an installed package is 'neither"),
        ("verbs", "other = toys_of_test:SHOUT", "expected a Verb('other', ...)"),
        ("verbs", "loud = toys_of_test:LOUD", "the arguments of the verb 'loud' cannot be added (ArgumentError"),
        ("metrics", "gone = toys_of_test:GONE", "'gone' (toys_of_test:GONE) of toys could not be loaded (AttributeError"),
        ("metrics", "rel = toys_of_test:LONGEST", "takes a name of metrics that is there already"),
        ("metrics", "words = toys_of_test:WORDS", "the metric 'words' of an installed package is 'neither"),
    ],
)
def test_what_is_broken_outside_is_one_sentence(outside, group, point, said, capsys, tmp_path):
    outside(group, point)
    (tmp_path / "results.jsonl").write_text('{"method": "A", "seed": 0, "checkpoint": 1, "scores": {"rel": 1}}\n')
    assert cli.main(["report", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert said in err and err.startswith("nmke") and err.count("\n") == 1


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys\nfrom easyedit_nmke import cli\n"
        "for argv in (['--help'], ['compare', '--help'], ['log']):\n"
        "    try: cli.main(argv)\n"
        "    except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'pandas', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
