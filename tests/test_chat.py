"""`nmke chat`: what both models say, undoing on a copy, Ctrl-C, and a folder that stays as it is."""

import hashlib
import io
import os
import shutil
import signal

import pytest
import torch
from rich.console import Console

from easyedit_nmke import LifelongEditor, NMKEHyperParams, atlas, cli
from easyedit_nmke.cli import chat, kept
from easyedit_nmke.history.journal import Journal
from easyedit_nmke.scores import generation
from easyedit_nmke.scores.generation import greedy_texts

TOKENS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of three edits of the embedded model."""
    folder = tmp_path_factory.mktemp("kept")
    settings = NMKEHyperParams(
        model_name="atlas", device="cpu", layers=[0, 1], v_num_grad_steps=12, v_lr=0.8, neurons="all", mom2_dataset="atlas",
        mom2_n_samples=200, nullspace_fraction=0.9, stats_dir=str(folder / "stats"), state_dir=str(folder / "state"),
    )  # fmt: skip
    editor = LifelongEditor.from_hparams(settings)
    for request in atlas.requests(3):
        editor.apply([request])
    editor.close()
    return folder / "state"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "state")


def bytes_of(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """talk("a line", ...) -> what `nmke chat` prints when a pipe says so."""

    def run(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert cli.main(["chat", str(folder), "--tokens", str(TOKENS)]) == 0
        return capsys.readouterr().out

    return run


def greedy(folder, prompt, undone=()):
    """What the unedited and the edited model say, by `greedy_texts` of a model that is loaded anew."""
    unedited, editor = atlas.load(), LifelongEditor.of_folder(folder, write=False)
    for edit in undone:
        editor.undo(edit)
    pairs = (unedited, (editor.model, editor.tok))
    return [greedy_texts(model, tok, [prompt], TOKENS)[0].strip() for model, tok in pairs]


def answers(printed):
    """Question -> (unedited, edited), without the mark of a cut."""
    found = {}
    for part in printed.split("\n> ")[1:]:
        question, *lines = part.splitlines()
        told = [line[10:].removesuffix(" […]") for line in lines if line.startswith(("Unedited: ", "Edited:   "))]
        if told:
            found[question] = told
    return found


def test_both_answers_are_greedy_and_the_folder_stays_as_it_is(folder, talk):
    before, asked = bytes_of(folder), [request["prompt"] for request in atlas.requests(3)]
    printed = talk(*asked, "", "/undo 2", asked[1] + " ", "/edits")
    first, again = printed.split("Edit 2 is taken out here")
    assert answers(first) == {prompt: greedy(folder, prompt) for prompt in asked}
    assert sum(one != other for one, other in answers(first).values()) >= 2  # the edits show
    assert answers(again) == {asked[1]: greedy(folder, asked[1], undone=[2])}
    assert answers(again)[asked[1]] != answers(first)[asked[1]]
    assert "atlas without and with 3 edits of NMKE, asked as texts" in printed and "undone" in again
    assert bytes_of(folder) == before and [edit["now"] for edit in kept.edits(folder)] == ["effective"] * 3


def test_a_folder_that_another_process_writes_can_be_asked(folder, talk):
    with Journal.open(folder):
        assert "Edited:" in talk("The capital of")


def test_what_cannot_be_done_is_said_and_the_talk_goes_on(talk):
    said = talk("/undo", "/undo 9", "/undone 3", "/plain", "/help", "so " * 400, "One", "/quit", "Two")
    for part in ("/undo takes the number of an edit", "there is no edit 9", "there is no /undone (did you mean '/undo'?)",
                 "no chat format", "/quit       end", "the model's context is 256", "> One"):  # fmt: skip
        assert part in " ".join(said.split()) or part in said, part
    assert "> Two" not in said


def test_the_chat_format_is_used_where_there_is_one(folder, monkeypatch):
    assert kept.Sides(folder).in_chat is None
    opened, begin, seen = LifelongEditor.of_folder, generation.Spoken.__init__, []

    def with_template(*args, **options):
        editor = opened(*args, **options)
        editor.tok.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}<s>"
        return editor

    monkeypatch.setattr(kept.LifelongEditor, "of_folder", with_template)
    spy = lambda self, model, tok, text, *rest: seen.append(text) or begin(self, model, tok, text, *rest)
    monkeypatch.setattr(generation.Spoken, "__init__", spy)
    sides = kept.Sides(folder)
    next(sides.answers("Who?", 3))
    sides.in_chat = False
    next(sides.answers("Who?", 3))
    assert seen == [*["<s>Who?</s><s>"] * 2, "Who?", "Who?"]


def test_ctrl_c_ends_an_answer_and_leaves_the_model(folder, monkeypatch):
    sides = kept.Sides(folder)
    weights = {name: parameter.clone() for name, parameter in sides.editor.model.named_parameters()}
    go_on, count = generation.Spoken.go_on, []

    def interrupted(self):
        count.append(self)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        go_on(self)

    monkeypatch.setattr(generation.Spoken, "go_on", interrupted)
    console = Console(file=io.StringIO(), width=80, height=20)
    before = signal.getsignal(signal.SIGINT)
    chat._ask("The capital of", sides, 50, console)
    assert len(count) == 6 and [len(spoken.ids) for spoken in count[-2:]] == [3, 3] and signal.getsignal(signal.SIGINT) is before
    assert console.file.getvalue().count("[…]") == 2
    assert all(torch.equal(weights[name], parameter) for name, parameter in sides.editor.model.named_parameters())


def test_a_terminal_has_two_columns_that_grow(folder):
    sides, file = kept.Sides(folder), io.StringIO()
    prompt = atlas.requests(1)[0]["prompt"]
    chat._ask(prompt, sides, TOKENS, Console(file=file, width=100, height=20, force_terminal=True, color_system=None))
    shown, (unedited, edited) = file.getvalue(), greedy(folder, prompt)
    assert shown.count("Unedited") >= 3  # drawn again with each token
    last = shown[shown.rindex("Unedited") :]
    columns = [(line[:50], line[50:]) for line in last.splitlines() if not set(line) <= set(" ─━\x1b[0123456789mKAh?l25")]
    left, right = (" ".join(" ".join(part[i] for part in columns[1:]).split()) for i in range(2))
    assert left.startswith(" ".join(unedited.split())) and right.startswith(" ".join(edited.split()))


def test_one_set_of_weights_beside_the_edited_matrices(folder):
    sides = kept.Sides(folder)
    state, view = sides.editor.state, dict(sides.editor.model.named_parameters())
    assert set(sides._originals) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    base = state.changes()[0]
    assert all(tensor.data_ptr() == base[name].data_ptr() for name, tensor in sides._originals.items())  # on a CPU not even those
    pointers = {name: parameter.data_ptr() for name, parameter in view.items()}
    list(sides.answers("The capital of", 3))
    assert {name: parameter.data_ptr() for name, parameter in view.items()} == pointers


def test_what_a_stopped_process_left_half_done_does_not_count(folder):
    with Journal.open(folder) as journal:
        journal.append({"kind": "begin"}, {})
        journal.append({"kind": "undo", "edit": 2, "digest": None}, {})
    before = bytes_of(folder)
    assert [edit["now"] for edit in kept.Sides(folder).edits] == ["effective"] * 3
    assert kept.edits(folder) == kept.Sides(folder).edits and bytes_of(folder) == before
