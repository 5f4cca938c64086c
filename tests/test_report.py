"""The report against synthetic results that look like a comparison's, and an independent computation of its numbers."""

import base64
import html
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from easyedit_nmke import cli
from easyedit_nmke.experiments import board, figures, page, report

CHECKPOINTS = (1, 25, 50, 100, 200, 400)
# method: (Rel lost per root of edits, Loc lost, Rel at once, s/edit, mask density)
METHODS = {
    "NMKE": (0.014, 0.016, 0.92, 0.55, 0.6),
    "NMKE+": (0.003, 0.002, 0.97, 0.61, 0.6),
    "AlphaEdit": (0.008, 0.014, 0.99, 0.34, 1.0),
    "MEMIT": (0.010, 0.008, 0.97, 0.36, 1.0),
    "ROME": (0.045, 0.044, 0.99, 0.21, 1.0),
    "FT": (0.040, 0.030, 0.98, 0.12, 1.0),
    "NMKE random mask": (0.0125, 0.0155, 0.94, 0.36, 0.6),
}


def line(method, seed, t, portability=True, layers=("0", "1", "2")):
    """One line of results.jsonl, made up but plausible, the same for the same arguments."""
    rel_loss, loc_loss, start, pace, density = METHODS.get(method, (0.02, 0.02, 0.95, 0.3, 1.0))
    noise = np.random.default_rng([*method.encode(), seed, t])
    share = lambda mean: float(np.clip(mean + noise.normal(0, 0.012), 0, 1))
    rel, loc = share(start - rel_loss * math.sqrt(t)), share(0.995 - loc_loss * math.sqrt(t))
    scores = {
        "rel": rel, "gen": share(rel - 0.06), "loc": loc, "neighborhood": share(loc - 0.02), "unrelated": share(loc + 0.02),
        "same_subject": share(0.55 * loc), "portability": share(0.7 * rel) if portability else None, "rel_exact": share(rel - 0.04),
        "rel_contains": share(rel - 0.02), "gen_exact": share(rel - 0.12), "gen_contains": share(rel - 0.1),
        "rel_preferred": share(rel + 0.03), "gen_preferred": share(rel), "fluency": 4.6 - 2 * (1 - loc) + noise.normal(0, 0.05),
        "general": share(0.91 - (1 - loc) * 0.6), "immediate": share(start), "surprise": 3,
        "kept_kl": 0.4 * (1 - loc) + 0.001, "perplexity": 31 + 40 * (1 - loc),
    }  # fmt: skip
    scores = {name: value if value is None else float(value) for name, value in scores.items()}
    tenths = [None] * (10 - t) + [rel] * t if t < 10 else [share(rel - 0.004 * rel_loss * t * (4.5 - i)) for i in range(10)]
    edges = np.linspace(-5, 1, 41)
    centre = math.log10(0.003 * math.sqrt(t) * (1 + 20 * loc_loss))
    drift = {
        layer: {
            "frobenius": 0.004 * math.sqrt(t) * (1 + 30 * loc_loss) * (1 + 0.2 * int(layer)), "row_cosine": 0.99,
            "norm_before": 20.0, "norm": 20.0 * (1 + 0.00005 * t * 40 * loc_loss),
            "histogram": {"edges": edges.tolist(),
                          "counts": np.histogram(noise.normal(centre + 0.1 * int(layer), 0.5, 2048), edges)[0].tolist()},
        } for layer in layers
    }  # fmt: skip
    phases = {
        "values": 0.45 * pace * t,
        "attribution": (0.3 if density < 1 else 0) * pace * t,
        "keys": 0.05 * pace * t,
        "solve": 0.15 * pace * t,
    }
    return {
        "method": method, "seed": seed, "checkpoint": t, "scores": scores,
        "retention": {"rel": tenths, "gen": [x if x is None else max(0, x - 0.06) for x in tenths]}, "drift": drift,
        "mask": {"density": dict.fromkeys(layers, density), "overlap": dict.fromkeys(layers, 0.7 if density < 1 else 1.0)},
        "seconds": {**phases, "total": pace * t * (1 + 0.02 * seed)}, "peak_memory_mb": {"edit": 800.0 + t / 10, "score": 900.0},
        "protocol": {
            "protocol": "edit all, then score all, against the unedited model", "method": method.split()[0],
            "hparams": {"layers": [0, 1, 2], "L2": 5, "note": "a < b & c"}, "batch_size": 1, "seed": seed,
            "data": {"name": "atlas, test half", "sha256": "ab" * 32, "edits": 400},
            "model": {"type": "llama", "edited_weights": "0123456789abcdef"}, "device": "cpu",
            "command": "nmke compare --model atlas --edits 400 --seeds 0,1,2 --out results",
            "versions": {"python": "3.11.2", "torch": "2.13.0"},
        },
        "unheard_of": {"ignored": True},
    }  # fmt: skip


def unedited(seed):
    scores = {
        "rel": 0.01,
        "gen": 0.01,
        "loc": 1.0,
        "same_subject": 1.0,
        "general": 0.91 + 0.005 * seed,
        "kept_kl": 0.0,
        "perplexity": 31.0,
        "fluency": 4.7,
        "rel_exact": 0.0,
    }
    return {"method": "unedited", "seed": seed, "checkpoint": 0, "scores": scores, "protocol": line("NMKE", seed, 1)["protocol"]}


def comparison(methods=tuple(METHODS), seeds=(0, 1, 2), checkpoints=CHECKPOINTS, **kw):
    """Lines in the order in which a comparison writes them: seed after seed, method after method."""
    return [
        entry
        for seed in seeds
        for entry in (unedited(seed), *(line(method, seed, t, **kw) for method in methods for t in checkpoints))
    ]


def save(folder: Path, lines, tail="") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines) + tail)
    return folder


class Tables(HTMLParser):
    """Tables of a page as [[(text, class), ...], ...], in order, those before the scores (who leads, batch sizes side by side,
    costs) apart by their class, and everything that would be loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.first, self.loaded, self.tags, self.cell = [], {}, [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs.items() if name in ("src", "href", "srcset", "data", "action")]
        if tag == "table":
            self.rows = []
            if attrs.get("class") in ("leaders", "sides", "costs"):
                self.first[attrs["class"]] = self.rows
            else:
                self.tables.append(self.rows)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = ["", attrs.get("class", "")]

    def handle_data(self, data):
        if self.cell is not None:
            self.cell[0] += data.replace("\xa0", " ")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append((self.cell[0].strip(), self.cell[1].strip()))
            self.cell = None


def made(folder):
    """(page's text, its tables) after `nmke report`."""
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / "report" / "report.html").read_text()
    return text, Tables(text).tables


def expected(lines, method, t, score):
    """Independently: mean and standard error over the seeds' lines, as printed."""
    found = [entry for entry in lines if entry["method"] == method and entry["checkpoint"] == t]
    values = [entry["seconds"]["total"] / t if score == "s/edit" else entry["scores"].get(score) for entry in found]
    values, digits = [value for value in values if value is not None], 3 if score == "kept_kl" else 2
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


KEYS = ["rel_exact", "gen_exact", "rel", "gen", "loc", "same_subject", "portability", "general", "kept_kl", "fluency", "s/edit"]
HEADINGS = [
    "Free Rel ↑",
    "Free Gen ↑",
    "Rel ↑",
    "Gen ↑",
    "Loc ↑",
    "Same subject ↑",
    "Port ↑",
    "General ↑",
    "Kept KL ↓",
    "Fluency ↑",
    "s/edit ↓",
]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """(folder, lines, page, tables) of the whole comparison."""
    lines = comparison()
    folder = save(tmp_path_factory.mktemp("full"), lines)
    return folder, lines, *made(folder)


def test_the_tables_hold_means_and_standard_errors_of_the_largest_shared_checkpoint_then_of_the_others(full):
    _, lines, _, tables = full
    for table, t in zip(tables, (400, 1, 25, 50, 100, 200), strict=False):
        (_, *headings), first, *rows = [[text for text, _ in row] for row in table]
        assert headings == HEADINGS and [row[0] for row in rows] == list(METHODS)
        assert first == ["unedited"] + [expected(lines, "unedited", 0, key) if key != "s/edit" else "-" for key in KEYS]
        for method, *cells in rows:
            assert cells == [expected(lines, method, t, key) for key in KEYS]


def test_the_best_method_of_every_column_is_bold_and_what_may_equal_it_is_marked(full):
    _, lines, text, tables = full
    means = {key: {name: float(expected(lines, name, 400, key).split()[0]) for name in METHODS} for key in KEYS}
    for place, key in enumerate(KEYS, 1):
        wanted = (min if key in ("kept_kl", "s/edit") else max)(means[key].values())
        bold = {row[0][0] for row in tables[0][1:] if row[place][1] == "best"}
        assert bold == {name for name, mean in means[key].items() if mean == wanted}, key
    assert re.search(r"td\.best \{[^}]*font-weight: 700", text)


@pytest.mark.parametrize("other, marked", [(0.88, "close"), (0.85, ""), (0.901, "best")])
def test_close_is_within_the_standard_error_of_the_distance_and_equal_as_printed_is_best(other, marked):
    lines = []
    for name, mean in (("A", 0.9), ("B", other)):
        for seed, shift in enumerate((-0.03, 0, 0.03)):  # standard error of a mean .0173, of a distance .0245
            lines.append({"method": name, "seed": seed, "checkpoint": 10, "scores": {"rel": mean + shift}})
    headings, ((_, [a]), (_, [b])) = report.rows(lines, 10)
    assert headings == ["Rel ↑"] and b == (f"{other:.2f} ± 0.02", marked)
    assert a[1] == "best"


def test_the_summary_says_what_the_numbers_say(full):
    _, lines, text, _ = full
    said = report.headline(lines, 400)

    def balance(name, parts):
        found = [e["scores"] for e in lines if (e["method"], e["checkpoint"]) == (name, 400)]
        return [statistics.harmonic_mean([s[part] for part in parts]) for s in found]

    for sentence, protocol, parts in (
        (said[0], "free generation", ("rel_exact", "gen_exact", "loc")), (said[1], "teacher forcing", ("rel", "gen", "loc")),
    ):  # fmt: skip
        ranked = sorted(METHODS, key=lambda name: -statistics.mean(balance(name, parts)))
        first, second = ranked[:2]
        assert sentence.startswith(f"After 400 edits {first} has the highest harmonic mean of Rel, Gen and Loc by {protocol}: ")
        own = balance(first, parts)
        assert f"{statistics.mean(own):.2f} ± {statistics.stdev(own) / 3**0.5:.2f} (3 seeds)" in sentence
        assert f"next is {second} with {statistics.mean(balance(second, parts)):.2f}" in sentence
    assert f"{float(expected(lines, first, 400, 'rel').split()[0]):.0%} of the new answers' tokens" in said[2]
    assert f"takes {float(expected(lines, first, 400, 's/edit').split()[0]):.2g} s an edit." in said[2]
    unedited_general, general = (expected(lines, *place, "general").split()[0] for place in (("unedited", 0), (first, 400)))
    assert said[3] == f"The unedited model's general score is {unedited_general}, that of {first} {general}."
    assert all(sentence in html.unescape(text) for sentence in said)


def test_methods_are_compared_by_pairs_over_the_records_of_all_seeds():
    """The distance of two harmonic means and its error, as leaving out one record after the other gives them."""
    draw, names = np.random.default_rng(0), ("rel", "gen", "loc")
    told = {name: draw.uniform(0.2, 1, (2, 3, 200)) for name in "AB"}
    told["B"] = 0.9 * told["A"] + 0.05 * told["B"]
    lines = [
        {"method": method, "seed": seed, "checkpoint": 200, "scores": {}, "records": dict(zip(names, values.tolist(), strict=True))}
        for method, seeds in told.items() for seed, values in enumerate(seeds)
    ]  # fmt: skip
    rows = {name: np.concatenate(list(values), 1).T for name, values in told.items()}
    balance = lambda some: statistics.harmonic_mean(some.mean(0))
    without = [balance(np.delete(rows["B"], i, 0)) - balance(np.delete(rows["A"], i, 0)) for i in range(400)]
    first, (method, behind, error, count) = report.pairs(lines, 200, names)
    assert first == ("A", 0.0, 0.0, 400) and (method, count) == ("B", 400)
    assert behind == pytest.approx(balance(rows["B"]) - balance(rows["A"]), abs=1e-12)
    assert error == pytest.approx(399 / 400**0.5 * statistics.stdev(without), rel=1e-2)
    lines[3]["records"]["gen"][7] = None  # nothing was asked there: other records than the first method's
    assert report.pairs(lines, 200, names) == [first]
    assert report.pairs(lines[:2], 200, names) == [] == report.pairs(lines, 100, names)
    nothing = [{**entry, "records": {**entry["records"], "gen": [None] * 200}} for entry in lines]  # no paraphrases
    assert report.pairs(nothing, 200, names) == []
    refused = [{**entry, "protocol": {"data": {"sha256": "1", "refused": int(entry["method"] == "B")}}} for entry in lines]
    assert report.pairs(refused, 200, names) == [first], "the records are others"
    torn = [{**entry, "records": {**entry["records"], "gen": [1.0]}} for entry in lines]
    assert report.pairs(torn, 200, names) == []


def test_pairs_are_told_in_a_sentence_where_records_are_kept(full):
    lines = [{**entry, "records": {name: [1.0, 0.5] for name in ("rel", "gen", "loc")}} for entry in comparison(seeds=(0,))]
    assert not any("By pairs" in sentence for sentence in report.headline(full[1], 400))
    said = [sentence for sentence in report.headline(lines, 400) if sentence.startswith("By pairs")]
    assert len(said) == 1 and said[0].startswith("By pairs over 2 records, by tokens: ") and said[0].count("+0.000 ± 0.000") == 6


def test_a_lead_within_the_error_one_seed_and_a_single_method_are_not_oversold():
    lines = [
        {"method": name, "seed": seed, "checkpoint": 10, "scores": {"rel": mean + shift, "loc": 0.9}}
        for name, mean in (("A", 0.9), ("B", 0.89), ("C", 0.2))
        for seed, shift in enumerate((-0.03, 0, 0.03))
    ]
    said = report.headline(lines, 10)[0]
    assert "A has the highest harmonic mean of Rel and Loc" in said and "within one standard error of B" in said and "C" not in said
    said = report.headline([entry for entry in lines if entry["seed"] == 0], 10)[0]
    assert "A has the highest" in said and "One seed cannot tell a difference from chance." in said and "±" not in said
    said = report.headline([entry for entry in lines if entry["seed"] == 0 or entry["method"] == "A"], 10)[0]
    assert "One seed (B and C) cannot tell a difference from chance." in said and "(3 seeds)" in said
    said = report.headline([entry for entry in lines if entry["method"] == "A"], 10)[0]
    assert "highest" not in said and "After 10 edits A has a harmonic mean of Rel and Loc of 0.90" in said
    nothing = [{"method": "A", "seed": 0, "checkpoint": 10, "scores": {"rel": None}}]
    assert report.headline(nothing, 10) == ["After 10 edits not every method has a Rel, so nothing is ranked."]


def test_the_page_needs_nothing_from_outside(full):
    *_, text, _ = full
    page_read = Tables(text)
    assert page_read.loaded and all(value.startswith("data:image/png;base64,") for value in page_read.loaded)
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//\w|url\(|@import|<script|<link", outside)
    for part in (
        "nmke compare --model atlas --edits 400",
        "ab" * 32,
        "2.13.0",
        "a &lt; b &amp; c",
        "Hyperparameters of NMKE random mask",
    ):
        assert part in outside
    assert page_read.tags.count("details") == len(CHECKPOINTS) - 1 + len(METHODS)


@pytest.mark.parametrize("width", [400, 420, 1280])
def test_no_picture_is_wider_than_the_screen(full, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    folder, _, text, _ = full
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert re.search(r"^img \{ max-width: 100%;", style, re.MULTILINE) and not re.search(r"#\w+ \{|img\.", style)
    if browser is None:
        pytest.skip("no browser to look with")
    script = (
        "<script>onload = () => { const page = document.querySelector('iframe').contentDocument;"
        "const ends = [...page.images].map(image => image.getBoundingClientRect().right);"
        "document.querySelector('pre').textContent = JSON.stringify([page.documentElement.scrollWidth, ...ends]) }</script>"
    )
    frame = (
        f"<iframe src='{folder / 'report' / 'report.html'}' style='border: 0; width: {width}px; height: 900px'></iframe><pre></pre>"
    )
    (tmp_path / "frame.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}{script}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [browser, *options, "--virtual-time-budget=10000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    whole, *ends = json.loads(re.search(r"<pre>(\[.*?\])</pre>", done.stdout)[1])
    assert len(ends) == 5 and max(ends) <= whole <= width
    assert max(ends) > 0.8 * width  # and they take the room there is


@pytest.mark.parametrize("name", ["curves", "frontier", "retention", "drift", "timing"])
def test_figures_are_pictures_with_every_method_in_its_colour(full, name):
    folder, _, text, _ = full
    path = folder / "report" / f"{name}.png"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 500 and base64.b64encode(path.read_bytes()).decode() in text
    present = {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0)}
    if name != "timing":
        for colour in figures.COLOURS[: len(METHODS)]:
            assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in present
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all(), "something is cut off at the edge"


def test_no_label_of_the_frontier_covers_another(full):
    _, lines, _, _ = full
    many = [*lines, *comparison([f"easyedit:M{i}" for i in range(9)])]
    figure = figures.frontier(report.frame(many), report.methods(many))
    figure.draw_without_rendering()
    notes = figure.axes[0].texts
    boxes = [note.get_window_extent() for note in notes]
    assert len(boxes) == len(METHODS) + 9
    area = figure.axes[0].get_window_extent()
    for i, (note, box) in enumerate(zip(notes, boxes, strict=True)):
        text_box = matplotlib.text.Text.get_window_extent(note)
        assert area.x0 - 1 <= text_box.x0 and text_box.x1 <= area.x1 + 1 and box.width > 0
        assert not any(text_box.overlaps(matplotlib.text.Text.get_window_extent(other)) for other in notes[:i])


@pytest.mark.parametrize("count", [1, 9, 15, 24])
def test_every_name_of_a_legend_is_on_the_figure(count):
    lines = comparison([f"NMKE[general_bias=0.{number}]" for number in range(count)])
    figure = figures.curves(report.frame(lines), report.methods(lines))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.texts) >= count and box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_figures_draw_the_numbers():
    lines = comparison(("NMKE", "FT"), seeds=(0, 1))
    data, names = report.frame(lines), ["NMKE", "FT"]
    axes = {ax.get_title("left"): ax for ax in figures.curves(data, names).axes}
    drawn = {curve.get_label(): curve.get_ydata() for curve in axes["Rel ↑"].get_lines()}
    wanted = [
        statistics.mean(e["scores"]["rel"] for e in lines if (e["method"], e["checkpoint"]) == ("FT", t)) for t in CHECKPOINTS
    ]
    assert drawn["FT"] == pytest.approx(wanted) and set(drawn) == {"NMKE", "FT"}
    assert {curve.get_label() for curve in axes["General ↑"].get_lines()} == {"NMKE", "FT", "unedited"}
    kept = {curve.get_label(): curve.get_ydata() for curve in axes["Kept text: KL ↓"].get_lines()}
    wanted = [np.mean([e["scores"]["kept_kl"] for e in lines if (e["method"], e["checkpoint"]) == ("FT", t)]) for t in CHECKPOINTS]
    assert kept["FT"] == pytest.approx(wanted) and "Kept text: perplexity ↓" in axes
    old = figures.retention(lines, names, 400).axes[0].get_lines()[0].get_ydata()
    found = [e["retention"]["rel"] for e in lines if (e["method"], e["checkpoint"]) == ("NMKE", 400)]
    assert old == pytest.approx(np.mean(found, axis=0))
    ratio = figures.drift(lines, names, 400).axes[3].get_lines()[1].get_ydata()
    found = [[e["drift"]["0"]["norm"] / 20 for e in lines if (e["method"], e["seed"]) == ("FT", seed)] for seed in (0, 1)]
    assert ratio == pytest.approx(np.mean(found, axis=0))
    bars = figures.timing(lines, names, 400).axes[0].patches
    assert sum(bar.get_width() for bar in bars if abs(bar.get_y() + bar.get_height() / 2) < 0.1) == pytest.approx(0.55 * 1.01)


def test_histograms_of_seeds_with_other_bins_are_pooled_without_losing_neurons():
    figure = matplotlib.figure.Figure()
    ax = figure.subplots()
    seeds = [{"edges": [0, 1, 2, 3, 4], "counts": [0, 4, 4, 0]}, {"edges": [4, 5, 6, 7, 8], "counts": [0, 8, 0, 0]}]
    figures._neurons(ax, seeds, "NMKE", figures.style(0))
    line = ax.get_lines()[0]
    assert line.get_xdata().tolist() == [1, 3, 5, 7] and line.get_ydata() == pytest.approx([4 / 16, 4 / 16, 8 / 16, 0])
    figures._neurons(ax, [seeds[0], seeds[0]], "NMKE", figures.style(0))
    assert ax.get_lines()[1].get_ydata() == pytest.approx([0, 0.5, 0.5, 0])


def test_a_partial_file_is_reported_as_far_as_it_goes(tmp_path, capsys):
    lines = [e for e in comparison() if not (e["method"] == "FT" and (e["seed"] == 2 or e["checkpoint"] > 50))]
    lines.append(line("NMKE", 3, 1))
    folder = save(tmp_path, lines, tail='{"method": "FT", "seed": 2, "check')
    text, tables = made(folder)
    assert [text for text, _ in tables[0][-2]] == ["FT", *(expected(lines, "FT", 50, key) for key in KEYS)]
    later = next(table for table in tables[1:] if table[2][3][0] == expected(lines, "NMKE", 400, "rel"))
    assert "FT" not in [row[0][0] for row in later]
    out = capsys.readouterr().out
    for said in (
        "The last line of results.jsonl is cut short and was left out",
        "FT is incomplete: nothing of seed 0 at T = 100, 200, 400; seed 1 at T = 100, 200, 400; seed 2; seed 3.",
        "NMKE is incomplete: nothing of seed 3 at T = 25, 50, 100, 200, 400.",
        "over 3 seeds (FT: 2).",
    ):
        assert said in out and said in text
    assert "After 50 edits" in out


def test_edits_that_could_not_be_written_are_counted_and_listed_and_none_are_not_mentioned(full, tmp_path, capsys):
    assert "could not be written" not in full[2]
    lines = comparison(("NMKE", "FT", "ROME"), seeds=(0, 1), checkpoints=(50, 100))
    for entry in lines:
        if entry["method"] == "FT" and entry["seed"] == 1:
            entry["failed"] = [3, 40] if entry["checkpoint"] == 50 else [3, 40, *range(80, 90)]
        elif entry["method"] == "ROME":
            entry["failed"] = entry["seed"]  # as files of before held them
        elif entry["method"] == "NMKE":
            entry["failed"] = []
    text, _ = made(save(tmp_path, lines))
    out = capsys.readouterr().out
    for said in (
        "FT, seed 1: 12 edits could not be written (3, 40, 80, 81, 82, 83, 84, 85, 86, 87, ...).",
        "ROME, seed 1: 1 edit could not be written.",
    ):
        assert said in out and said in text
    assert out.count("could not be written") == text.count("could not be written") == 2


def test_of_lines_of_the_same_place_the_last_counts(tmp_path):
    first, other, again = line("NMKE", 0, 25), line("FT", 0, 25), line("NMKE", 0, 25)
    again["scores"]["rel"] = 0.125
    lines, notes = report.read(save(tmp_path, [first, other, again]))
    assert [entry["method"] for entry in lines] == ["NMKE", "FT"] and not notes
    assert report.table(lines, 25).loc["NMKE", ("rel", "mean")] == 0.125


def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys):
    good = json.dumps(line("NMKE", 0, 25))
    for content, said in (
        (None, "there is no"),
        ('{"met\n' + good, "line 1 of"),
        ('{"method": "NMKE", "seed": 0}\n' + good, "line 1 of"),
        ('{"met', "no result of an edited model yet"),
        (json.dumps(unedited(0)), "no result of an edited model yet"),
        ("", "no result of an edited model yet"),
    ):
        if content is not None:
            (tmp_path / "results.jsonl").write_text(content)
        assert cli.main(["report", str(tmp_path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("nmke report: ") and said in err and err.count("\n") == 1
    assert cli.main(["report"]) == 2
    assert "nmke report results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint", float("inf")), ("checkpoint", "50"), ("checkpoint", -1), ("checkpoint", 10**30),
        ("seed", [0]), ("method", 3),
        ("scores", {"rel": {"mean": 1}}), ("scores", [1]), ("scores", {"rel": "1"}), ("seconds", 3), ("seconds", {"total": "3"}),
        ("seconds", {"total": 10**400}), ("peak_memory_mb", [1]), ("mask", {"density": 0.5}), ("mask", {"density": {"0": "half"}}),
        ("retention", {"rel": 0.5}), ("retention", {"rel": ["x"]}), ("drift", {"0": 1}), ("drift", {"0": {"frobenius": [1]}}),
        ("drift", {"0": {"histogram": {"edges": [0, 1]}}}), ("protocol", "edit all"), ("protocol", {"data": 3}), ("failed", "two"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
@pytest.mark.parametrize("last", [True, False])
def test_a_line_that_holds_something_else_is_told_by_its_number(tmp_path, name, value, last):
    good = json.dumps(line("NMKE", 0, 25))
    bad = json.dumps({**line("FT", 0, 25), name: value})
    lines = [good, bad] if last else [bad, good]
    (tmp_path / "results.jsonl").write_text("\n".join(lines).replace("Infinity", "1e400") + "\n")
    with pytest.raises(ValueError, match=rf"line {1 + last} of .*results\.jsonl is no result \({name} is not") as error:
        report.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_line_nested_too_deep_is_told_by_its_number(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(line("NMKE", 0, 25)) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .* \(it is nested too deep\)"):
        report.read(tmp_path)


def nulled():
    """One method without Gen, drift, masks, times and memory, and scores that nothing has."""
    lines = comparison(("NMKE", "MEMIT"), seeds=(0,), portability=False)
    for entry in lines:
        entry["scores"].update(general=None, fluency=float("nan"))
        if entry["method"] == "MEMIT":
            entry["scores"]["gen"] = None
            for name in ("drift", "mask", "retention", "seconds", "peak_memory_mb", "protocol"):
                entry[name] = None
    return lines


def bare():
    """Nothing but what a line must have."""
    return [{"method": "A|<b>", "seed": 0, "checkpoint": 1, "scores": {"rel": 1}}]


@pytest.mark.parametrize(
    "lines, pictures",
    [
        (comparison(("NMKE", "NMKE+"), seeds=(0,), checkpoints=(1, 25)), 5),
        (comparison(("NMKE", "NMKE+", "FT"), checkpoints=(200,)), 5),
        (comparison(("NMKE+",), seeds=(0, 1), checkpoints=(1, 25)), 5),
        ([line("NMKE", 0, 1)], 5),
        (nulled(), 5),
        (bare(), 1),
    ],
    ids=["one seed", "one checkpoint", "one method", "one line", "nulls", "bare"],
)
def test_small_and_empty_cases(lines, pictures, tmp_path, capsys):
    folder = save(tmp_path, lines)
    (folder / "report").mkdir()
    (folder / "report" / "drift.png").write_text("of an earlier report")
    text, tables = made(folder)
    assert "nan" not in capsys.readouterr().out.lower() and ">nan" not in text
    assert text.count("<img") == pictures == len(list((folder / "report").glob("*.png")))
    methods = list(dict.fromkeys(entry["method"] for entry in lines))
    assert [row[0][0] for row in tables[0][1:]] == sorted(methods, key=lambda name: name != "unedited")
    if len(set(methods) - {"unedited"}) == 1:
        assert not any(kind == "best" for row in tables[0] for _, kind in row)


def test_columns_that_nothing_has_are_left_out_and_single_holes_are_dashes(tmp_path):
    _, tables = made(save(tmp_path, nulled()))
    headings, *rows = [[text for text, _ in row] for row in tables[0]]
    assert headings == ["", "Free Rel ↑", "Free Gen ↑", "Rel ↑", "Gen ↑", "Loc ↑", "Same subject ↑", "Kept KL ↓", "s/edit ↓"]
    memit = next(row for row in rows if row[0] == "MEMIT")
    assert (memit[4], memit[-1]) == ("-", "-") and "-" not in (memit[1], memit[3], memit[5])


def test_markdown_is_the_table_for_the_readme(full, tmp_path, capsys):
    folder, *_, tables = full
    assert cli.main(["report", str(folder), "--markdown"]) == 0
    head, rule, *body = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head == "|  | " + " | ".join(HEADINGS) + " |" and rule.count("---:") == len(KEYS)
    for text, row in zip(body, tables[0][1:], strict=True):
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        assert [cell.strip("*") for cell in cells] == [cell for cell, _ in row]
        assert [cell.startswith("**") for cell in cells] == [kind == "best" for _, kind in row]
    assert report.markdown(bare(), 1).splitlines()[2] == "| A\\|<b> | 1.00 |"
    empty = save(tmp_path, bare())
    assert cli.main(["report", str(empty), "--markdown"]) == 0 and not (empty / "report").exists()


def batched(seeds=(0, 1)):
    """A comparison at b = 1 and b = 100: LocFT-BF knows no single edits, and what ends no batch is not scored."""
    lines = []
    for entry in comparison(("AlphaEdit", "AlphaEdit@100", "LocFT-BF", "ROME"), seeds, (1, 100, 200)):
        name, t = entry["method"], entry["checkpoint"]
        size = 100 if name in ("AlphaEdit@100", "LocFT-BF") else 1
        if name != "unedited":
            if t % size:
                continue
            entry["protocol"] |= {"batch_size": size, "method": name.removesuffix("@100")}
            entry["startup_seconds"] = {"templates": 2.0, "covariance": 238.0 if name != "ROME" else None}
            entry["kept_bytes"] = 2_500_000 * t if name != "LocFT-BF" else 0
        lines.append(entry)
    return lines


def test_batch_sizes_stand_side_by_side_free_generation_first():
    lines = batched()
    text = page.html(lines, [], {})
    tables = Tables(text).tables
    groups, scores, sizes, *rows = Tables(text).first["sides"]
    assert [said for said, _ in groups[1:]] == ["Free generation", "Teacher forcing", "As before", "Cost"]
    assert [said for said, _ in scores[1:]] == ["Rel", "Gen", "Rel", "Gen", "Loc", "s/edit"]
    assert [said for said, _ in sizes[1:]] == ["1", "100"] * 6
    found = {row[0][0]: [said.replace("±", " ±") for said, _ in row[1:]] for row in rows}
    assert list(found) == ["AlphaEdit", "LocFT-BF", "ROME"]
    keys = ["rel_exact", "gen_exact", "rel", "gen", "loc", "s/edit"]
    assert found["AlphaEdit"] == [expected(lines, name, 200, key) for key in keys for name in ("AlphaEdit", "AlphaEdit@100")]
    assert found["LocFT-BF"] == [said for key in keys for said in ("×", expected(lines, "LocFT-BF", 200, key))]
    assert found["ROME"] == [said for key in keys for said in (expected(lines, "ROME", 200, key), "")]
    assert "×: LocFT-BF learns edits together and knows no b = 1." in text
    best = max(("AlphaEdit", "AlphaEdit@100", "LocFT-BF", "ROME"), key=lambda n: float(expected(lines, n, 200, "rel").split()[0]))
    marked = [(row[0][0], place) for row in rows for place, (_, kind) in enumerate(row[5:7]) if "best" in kind]
    assert marked == [(best.removesuffix("@100"), int(best in ("AlphaEdit@100", "LocFT-BF")))]
    assert report.gaps(lines) == ["Not scored at T = 1, where no batch of 100 ends: AlphaEdit@100 and LocFT-BF."]
    assert report.gaps(lines)[0] in text
    assert [row[0][0] for row in tables[0][2:]] == ["AlphaEdit", "AlphaEdit@100", "LocFT-BF", "ROME"]


def test_who_leads_is_told_for_every_number_of_edits_and_batch_size():
    lines = batched()
    text = page.html(lines, [], {})
    (_, *headings), *rows = [[said for said, _ in row] for row in Tables(text).first["leaders"]]
    assert headings == ["Free generationb = 1", "Free generationb = 100", "Teacher forcingb = 1", "Teacher forcingb = 100"]
    assert [row[0] for row in rows] == ["T = 1", "T = 100", "T = 200"] and rows[0][2] == rows[0][4] == ""

    def mean(name, t, parts):
        found = [e["scores"] for e in lines if (e["method"], e["checkpoint"]) == (name, t)]
        return statistics.mean(statistics.harmonic_mean([s[part] for part in parts]) for s in found)

    for row, t in zip(rows[1:], (100, 200), strict=True):
        for place, (names, parts) in enumerate(
            [(names, parts) for parts in (("rel_exact", "gen_exact", "loc"), ("rel", "gen", "loc"))
             for names in (("AlphaEdit", "ROME"), ("AlphaEdit@100", "LocFT-BF"))]
        ):  # fmt: skip
            ranked = sorted(names, key=lambda name: -mean(name, t, parts))
            assert row[1 + place] == "".join(f"{name} {mean(name, t, parts):.2f}" for name in ranked)
    alone = page.html(comparison(("NMKE",), (0,), (1, 2)), [], {})
    assert not Tables(alone).first.keys() & {"leaders", "sides"}


def test_a_method_that_is_not_told_apart_from_the_first_is_named_wherever_it_stands():
    """The third, whose error is large, and not the second."""
    from easyedit_nmke.experiments import board

    means = {"A": (0.79, 0.80, 0.81), "B": (0.777, 0.78, 0.783), "C": (0.69, 0.77, 0.85)}
    lines = [
        {"method": name, "seed": seed, "checkpoint": 9, "scores": dict.fromkeys(("rel", "gen", "loc"), mean)}
        for name, of_seeds in means.items() for seed, mean in enumerate(of_seeds)
    ]  # fmt: skip
    _, [(_, cells)] = board.leaders(lines)
    assert cells == [[("A", "0.80"), ("C", "0.77")]]


def test_costs_are_told_on_the_page_in_the_shell_and_in_markdown(tmp_path, capsys):
    lines = batched(seeds=(0,))
    text = page.html(lines, [], {})
    head, *rows = [[said for said, _ in row] for row in Tables(text).first["costs"]]
    assert head == ["", "Batch", "Start-up", "An edit", "200 edits", "Peak memory", "Kept an edit"]
    assert rows[0] == ["AlphaEdit", "1", "4.0 min", "0.34 s", "68 s", "820 MB", "2.5 MB"]
    assert rows[2] == ["LocFT-BF", "100", "4.0 min", "0.30 s", "60 s", "820 MB", "0 kB"]
    assert rows[3][:4] == ["ROME", "1", "?", "0.21 s"]  # whose covariance does not tell what it took
    bold = {row[0][0]: [kind for _, kind in row[1:]] for row in Tables(text).first["costs"][1:]}
    assert bold["ROME"] == ["", "", "best", "best", "", ""] and bold["LocFT-BF"][-1] == "best"
    cli.report.comparison(lines, [], Console(width=100))
    out = capsys.readouterr().out
    assert re.search(r"LocFT-BF +100 +4\.0 min +0\.30 s +60 s +820 MB +0 kB", out)
    assert cli.main(["report", str(save(tmp_path, lines)), "--markdown"]) == 0
    assert "| ROME | 1 | ? | **0.21 s** | **42 s** | 820 MB | 2.5 MB |" in capsys.readouterr().out
    assert board.costs(comparison(("NMKE",), (0,), (10,)), 10)[0] == ["Batch", "An edit", "10 edits", "Peak memory"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0042, "4.2 ms"), (0.5, "0.50 s"), (12, "12 s"), (119, "119 s"), (120, "2.0 min"), (9000, "2.5 h")]
)
def test_times_are_told_in_their_own_unit(seconds, said):
    assert board._time(seconds) == said


def test_results_of_different_models_are_never_one_table(tmp_path, capsys):
    lines = comparison(("NMKE",), (0,), (10,))
    other = json.loads(json.dumps(line("MEMIT", 0, 10)))
    for entry in lines:
        entry["protocol"]["model"] = {"type": "llama", "weights": "aa"}
    other["protocol"]["model"] = {"type": "llama", "weights": "bb"}
    assert cli.main(["report", str(save(tmp_path / "mixed", [*lines, other]))]) == 1
    assert "holds results of different models (MEMIT's is another" in capsys.readouterr().err
    other["protocol"]["hparams"] = {"model_name": "/models/second"}
    save(tmp_path / "two" / "first", lines), save(tmp_path / "two" / "second", [other])
    assert cli.main(["report", str(tmp_path / "two")]) == 0
    out = capsys.readouterr().out
    assert out.count("Scores after 10 edits") == 2 and out.count("Scores after 10 edits of second") == 1
    pages = {name: (tmp_path / "two" / name / "report" / "report.html").read_text() for name in ("first", "second")}
    assert "MEMIT" not in pages["first"] and "<h1>second: 1 method, 10 edits" in pages["second"]
    assert cli.main(["report", str(tmp_path / "two"), "--out", str(tmp_path / "there"), "--markdown"]) == 0
    assert "**first**\n\n|" in capsys.readouterr().out and not (tmp_path / "there").exists()


def test_the_terminal_table_fits_eighty_columns(full, tmp_path, monkeypatch, capsys):
    folder, lines, _, _ = full
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "deep" / "out")]) == 0
    assert (tmp_path / "deep" / "out" / "report.html").is_file()
    table = capsys.readouterr().out.split("T = 400 edits")[0]
    assert max(map(len, table.splitlines())) <= 80 and "…" not in table and "KL" in table and "Fluency" not in table
    keys = [key for key in KEYS if key != "fluency"]  # which does not fit
    for name in METHODS:
        shown = name.removesuffix(" mask")  # which goes to the next line
        row = next(row for row in table.splitlines() if row.startswith(f" {shown} "))
        assert row.split()[-len(keys) :] == [expected(lines, name, 400, key).split()[0] for key in keys]


@pytest.mark.parametrize("missing", ["pandas", "matplotlib", "jinja2"])
def test_without_the_extra_only_the_report_is_missing_and_says_how_to_get_it(missing, tmp_path):
    save(tmp_path, bare())
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import easyedit_nmke; from easyedit_nmke import cli\n"
        f"print(cli.main(['check', 'atlas']), cli.main(['report', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["0", "1"]
    command = """python -m pip install -e ".[figures]" in this project's folder"""
    assert done.stderr.strip() == f"nmke report: the report needs {missing}: {command} brings it"
