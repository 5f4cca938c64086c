"""The judge: a tiny model on this machine, a stub of an OpenAI-compatible address, and what happens when either is not there."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from conftest import tiny_model
from test_real import found

from easyedit_nmke import LifelongEditor, atlas, cli
from easyedit_nmke.experiments.compare import read_lines
from easyedit_nmke.scores import judge as judges
from easyedit_nmke.scores.judge import Judge, Named, named, question

ITEMS = [
    ("The capital of Italy is", ("Rome", "Roma"), " Rome. It is old."),
    ("Lyon is in", ("Kenya",), " Italy, where the country is found and nothing else is said about it at all."),
    ("The bread costs", ("3 zloty",), "3 zloty"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with atlas' tokenizer, records to edit it with, and a file of settings."""
    home = tmp_path_factory.mktemp("judge")
    model, (_, tok) = tiny_model("llama", 2048), atlas.load()
    model.config.max_position_embeddings = 512  # its positions are rotations: it can read as far
    model.save_pretrained(home / "model")
    tok.save_pretrained(home / "model")
    settings = dict(
        alg_name="NMKE", model_name=str(home / "model"), device="cpu", layers=[0, 1], v_num_grad_steps=4, v_lr=0.5,
        mom2_dataset="atlas", mom2_n_samples=200, nullspace_fraction=0.9, template_prefixes=["The"],
        stats_dir=str(home / "stats"),
    )  # fmt: skip
    (home / "settings.yaml").write_text(yaml.safe_dump(settings))
    (home / "data.json").write_text(json.dumps(atlas.requests(2, "tune")))
    return home


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No address, and the stub is not looked for behind a proxy."""
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Stub:
    """An address that speaks chat completions. It says yes where the answer is in what was said; `replies`: (status, body) in place
    of its own, by turns; `after`: so many questions are answered, then none."""

    def __init__(self):
        self.asked, self.headers, self.replies, self.after = [], [], [], 10**9
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, reply = stub.reply(self.path, body, dict(self.headers))
                data = reply.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.lock = threading.Lock()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, path, body, headers):
        with self.lock:
            if self.replies:
                return self.replies.pop(0)
            self.headers.append(headers)
            assert path == "/v1/chat/completions" and (body["model"], body["temperature"]) == ("stub", 0)
            (message,) = body["messages"]
            if len(self.asked) >= self.after:
                return 503, "no more today"
            self.asked.append(message["content"])
        lines = dict(line.split(": ", 1) for line in message["content"].splitlines() if ": " in line)
        said, truths = lines["It went on"], lines["The expected answer"].split(" or ")
        return 200, completion("**Yes**, it does" if any(truth in said for truth in truths) else "<think>Yes?</think>\nNo.")

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def stub(monkeypatch):
    made = Stub()
    monkeypatch.setenv("OPENAI_BASE_URL", made.url + "/")
    yield made
    made.stop()


def run(folder, out, *more):
    edit = ["run", "--hparams", str(folder / "settings.yaml"), "--data", str(folder / "data.json"), "--out", str(out)]
    return cli.main([*edit, "--checkpoints", "1,2", *more])


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- on this machine


@torch.no_grad()
def plainly(model, tok, text):
    """Whether Yes is likelier than No behind a question: each token by itself."""

    def score(word):
        start, ids = len(tok(text)["input_ids"]), tok(f"{text} {word}")["input_ids"]
        steps = [model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].log_softmax(-1) for place in range(start, len(ids))]
        return sum(float(step[word]) for step, word in zip(steps, ids[start:], strict=True))

    return score("Yes") > score("No")


def test_a_local_judge_says_which_of_two_words_is_likelier(folder, tmp_path):
    judge = named(str(folder / "model"), tmp_path).open()
    model, (_, tok) = judge.ask.model, atlas.load()
    items = [(prompt, truths, f"{said} {i}") for i in range(3) for prompt, truths, said in ITEMS]
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tok)))
    for _ in range(12):  # until the model prefers neither word always
        expected = [plainly(model, tok, question(*item)) for item in items]
        if len(set(expected)) == 2:
            break
        model.lm_head.bias.data[tok(" Yes")["input_ids"]] += 0.5
    assert judge(items) == expected and len(set(expected)) == 2
    answers = lines_of(tmp_path / "judge.jsonl")
    assert [line["question"] for line in answers] == [question(*item) for item in items]
    assert answers[0]["by"]["judge"] == str(folder / "model") and len(answers[0]["by"]["judge weights"]) == 16
    assert "Rome or Roma" in answers[0]["question"] and judge.mark.keys() == {"judge", "judge weights", "judge prompt"}


def test_it_is_asked_in_its_chat_format(folder, tmp_path):
    judge = named(str(folder / "model"), tmp_path).open()
    tok = judge.ask.tok
    tok.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}<s>"
    rows = judge.ask._rows(question(*ITEMS[0]))
    assert [tok.decode(row.ids) for row in rows] == [f"<s>{question(*ITEMS[0])}</s><s>{word}" for word in ("Yes", "No")]


def test_a_local_judge_that_cannot_judge_says_so(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"judge: model '/no/such/folder' could not be loaded .*; for a model at an address set OPEN"
    ):
        named("/no/such/folder", tmp_path).open()
    judge = named(str(folder / "model"), tmp_path).open()
    with pytest.raises(ValueError, match="reads 512 tokens, and a question has"):
        judge([("a " * 600, ("Rome",), "Rome")])
    judge.ask.model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="log-probabilities nan and nan; choose another judge"):
        judge(ITEMS)
    assert not (tmp_path / "judge.jsonl").exists()


def test_a_run_judged_by_a_local_model(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(folder, tmp_path, "--judge", str(folder / "model"), "--also", "overedit,prefix") == 0
    printed = capsys.readouterr().out
    assert all(heading in printed for heading in ("Judged", "Prefix", "Overedit"))
    unedited, _, line = read_lines(tmp_path / "results.jsonl")
    for scores in (unedited["scores"], line["scores"]):
        assert all(0 <= scores[name] <= 1 for name in ("rel_judged", "gen_judged", "loc_judged", "prefix_judged", "overedit"))
    marked = line["protocol"]["scored_with"]
    assert marked["also"] == ["overedit", "prefix"] and marked["judge"] == str(folder / "model") and marked["judge weights"]
    assert line["protocol"]["hparams"]["target_eos"] is False


# ---- answers that are kept


class Counting:
    def __init__(self, fails=None):
        self.asked, self.fails = [], fails

    def __call__(self, questions):
        for text in questions:
            if self.fails is not None and len(self.asked) == self.fails:
                raise ValueError("it is down")
            self.asked.append(text)
            yield "Rome" in text


def test_answers_are_kept_by_judge_and_question(tmp_path):
    ask, file = Counting(), tmp_path / "judge.jsonl"
    judge = Judge(ask, {"judge": "a"}, file)
    assert judge([ITEMS[0], ITEMS[1], ITEMS[0], ("Rome", ("Rome",), " \n")]) == [True, False, True, False]
    assert len(ask.asked) == 2, "no question twice, and none about nothing said"
    again = Counting()
    assert Judge(again, {"judge": "a"}, file)(ITEMS) == [True, False, False] and again.asked == [question(*ITEMS[2])]
    other = Counting()
    assert Judge(other, {"judge": "b"}, file)(ITEMS[:1]) == [True] and len(other.asked) == 1
    assert [line["yes"] for line in lines_of(file)] == [True, False, False, True]


def test_a_line_that_a_killed_process_left_is_ended_and_asked_again(tmp_path, caplog):
    file = tmp_path / "judge.jsonl"
    Judge(Counting(), {"judge": "a"}, file)(ITEMS)
    file.write_text(file.read_text()[:-9])
    ask = Counting()
    assert Judge(ask, {"judge": "a"}, file)(ITEMS) == [True, False, False] and ask.asked == [question(*ITEMS[2])]
    assert "line 3 is not whole" in caplog.text
    assert json.loads(file.read_text().splitlines()[-1])["question"] == question(*ITEMS[2])


def test_what_was_answered_before_a_failure_is_kept(tmp_path):
    file = tmp_path / "judge.jsonl"
    with pytest.raises(ValueError, match="it is down"):
        Judge(Counting(2), {"judge": "a"}, file)(ITEMS)
    ask = Counting()
    assert Judge(ask, {"judge": "a"}, file)(ITEMS) == [True, False, False] and len(ask.asked) == 1


# ---- at an address


def test_an_address_is_asked_and_its_words_are_read(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret\n")
    judge = named("stub", tmp_path).open()
    assert len(stub.asked) == 2, "the plain questions"
    assert judge(ITEMS) == [True, False, True] and stub.asked.count(question(*ITEMS[0])) == 1
    assert {headers["Authorization"] for headers in stub.headers} == {"Bearer s3cret"}
    assert "s3cret" not in (tmp_path / "judge.jsonl").read_text() and "127.0.0.1" not in str(judge.mark)
    monkeypatch.delenv("OPENAI_API_KEY")
    judge([("Who?", ("He",), "He")])
    assert "Authorization" not in stub.headers[-1]


def test_a_judge_that_gets_plain_questions_wrong_is_told_of(stub, tmp_path, caplog):
    named("stub", tmp_path).open()
    assert not caplog.records
    stub.replies = [(200, completion("yes"))] * 2
    named("stub", tmp_path).open()
    assert "the judge 'stub' at http://127.0.0.1" in caplog.text and "plain questions wrong" in caplog.text


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, completion("Maybe, who knows"), r"answered 'Maybe, who knows', expected Yes or No; choose another judge"),
        (200, completion("Nobody knows"), r"answered 'Nobody knows', expected Yes or No"),
        (200, completion(None), "expected a chat completion"),
        (200, "<html>", "answered '<html>', expected a chat completion; see that it is up, and the same command goes on"),
        (404, '{"error":\n "no such model"}', r'refused a question \(status 404: {"error": "no such model"}\); see that'),
        (429, "", r"refused a question \(status 429: Too Many Requests\)"),
    ],
)
def test_what_is_no_answer_is_one_sentence(stub, tmp_path, monkeypatch, status, body, said):
    monkeypatch.setattr(judges, "WAITS", ())
    stub.replies = [(status, body)] * 2
    with pytest.raises(ValueError, match=said) as error:
        named("stub", tmp_path).open()
    assert "\n" not in str(error.value)


def test_a_busy_address_is_asked_again(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "WAITS", (0, 0, 0))
    stub.replies = [(429, "slow down")] * 3
    assert named("stub", tmp_path).open()(ITEMS) == [True, False, True]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/v1", "127.0.0.1/v1", "http://127.0.0.1:x/v1"])
def test_a_judge_that_is_down_ends_a_run_before_any_edit(folder, tmp_path, monkeypatch, capsys, address):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    applied = []
    monkeypatch.setattr(LifelongEditor, "apply", lambda self, batch: applied.append(batch))
    assert run(folder, tmp_path / "out", "--judge", "gpt") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"nmke run: the judge 'gpt' at {address} does not answer (") and message.endswith("goes on")
    assert not applied and read_lines(tmp_path / "out" / "results.jsonl") == []


def test_nothing_is_lost_when_the_judge_goes_down_and_the_run_goes_on_when_it_is_up(folder, tmp_path, stub, capsys, monkeypatch):
    assert run(folder, tmp_path / "whole", "--judge", "stub") == 0
    whole, before = read_lines(tmp_path / "whole" / "results.jsonl"), len(stub.asked)
    stub.asked.clear()
    stub.after = before - 1  # it goes down while the last checkpoint is judged
    assert run(folder, tmp_path / "out", "--judge", "stub") == 1
    assert "status 503: no more today" in capsys.readouterr().err
    held = read_lines(tmp_path / "out" / "results.jsonl")
    assert [line["checkpoint"] for line in held] == [0, 1]
    answered = lines_of(tmp_path / "out" / "judge.jsonl")
    assert len(answered) > 3
    stub.asked.clear()
    stub.after, applied, apply = 10**9, [], LifelongEditor.apply
    monkeypatch.setattr(LifelongEditor, "apply", lambda self, batch: (applied.append(batch), apply(self, batch))[1])
    assert run(folder, tmp_path / "out", "--judge", "stub") == 0
    assert not applied and not {line["question"] for line in answered} & set(stub.asked)
    lines = read_lines(tmp_path / "out" / "results.jsonl")
    assert [line["scores"] for line in lines] == [line["scores"] for line in whole]
    stub.asked.clear()
    assert run(folder, tmp_path / "out", "--judge", "stub") == 0 and not stub.asked, "nothing is left to be asked"
    for other in (["--judge", "other"], [], ["--judge", "stub", "--also", "prefix"]):
        assert run(folder, tmp_path / "out", *other) == 1
        assert "with other settings (" in capsys.readouterr().err and not stub.asked


def test_names_are_addresses_where_there_is_one(tmp_path, monkeypatch):
    assert named("gpt", tmp_path) == Named("gpt", None, tmp_path / "judge.jsonl")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://x/v1/")
    assert named("gpt", tmp_path) == Named("gpt", "http://x/v1", tmp_path / "judge.jsonl")


# ---- a real model


@pytest.mark.real
def test_smollm2_judges_offline_and_badly(tmp_path, caplog):
    found("smollm2")
    judge = named("smollm2", tmp_path).open()
    items = [
        ("The capital of Italy is", ("Rome",), " Rome."), ("The capital of Italy is", ("Rome",), " a large wooden chair."),
        ("The author of Hamlet is", ("Jane Austen",), " Jane Austen"), ("The author of Hamlet is", ("Jane Austen",), " 1848."),
    ]  # fmt: skip
    first = judge(items)
    assert len(lines_of(tmp_path / "judge.jsonl")) == 4 and named("smollm2", tmp_path).open()(items) == first
    assert "the judge 'smollm2' gets plain questions wrong" in caplog.text
    assert judge.ask.tok.chat_template and judge.key["judge weights"]
