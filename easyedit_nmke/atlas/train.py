"""Make the embedded model: `python -m easyedit_nmke.atlas.train` (about 30 minutes on 2 CPU cores).

Or a larger one of its kind, for a GPU: `python -m easyedit_nmke.atlas.train --size large --out FOLDER`.

A Llama that knows the facts of the world of its size in `facts.py`. Four things make it behave under editing as large models do:
loss weight 1 on answers and 0.1 elsewhere (facts are learned in minutes); a last word unique to each subject (keys of different
subjects are nearly orthogonal); a tenth of random objects in the last third (the answer distribution is calibrated, so an
optimised value can reach a low loss); and subject consolidation: in most fact sentences the words after the subject cannot see
its tokens in the lower layers, and only its last one above, so the fact is looked up at the last subject token and read later.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..files import write_json
from . import DIRECTORY
from . import facts as world

logger = logging.getLogger(__name__)
SMALL_HOURS = 0.54  # the embedded model's training, on 2 CPU cores

WIDTH = 48  # tokens in a row of a batch
IGNORED = -100


@dataclass(frozen=True)
class Size:
    """How one model is built and trained."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    lookup: int  # layers, from the lowest, in which the words after a subject cannot see it
    vocabulary: int
    rows: int  # of a batch
    steps: int
    warmup: int
    rate: float

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.ffn, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, max_position_embeddings=256, tie_word_embeddings=True,
            rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, pad_token_id=2, attn_implementation="eager",
        )  # fmt: skip


# The world that a size knows has the same name. "toy" knows nothing: it tries the trainer in seconds.
SIZES = {
    "small": Size(192, 2048, 6, layers=5, lookup=3, vocabulary=2048, rows=56, steps=3000, warmup=100, rate=2e-3),
    "large": Size(384, 4096, 6, layers=8, lookup=5, vocabulary=4096, rows=512, steps=6000, warmup=300, rate=1e-3),
    "toy": Size(32, 64, 2, layers=3, lookup=2, vocabulary=512, rows=4, steps=2, warmup=1, rate=1e-3),
}


@dataclass(frozen=True)
class Sentence:
    """Token ids of one training sentence, with its subject's and answer's token spans (end exclusive)."""

    ids: list[int]
    answer: tuple[int, int]
    subject: tuple[int, int] | None


def make_tokenizer(size: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Subject names enter once each, so they are cut into shared fragments as rare names are in large models."""
    facts, _ = world.make_world(size)
    text = [f" {e.prompt} {e.answer}." for e in world.make_exercises()]
    text += [f"{fact.subject} {fact.subject}" for fact in facts[::4]]
    for relation in world.RELATIONS + world.FOLLOWING:
        for template in relation.templates:
            text += [template.format("it") + f" {thing}." for thing in relation.objects]
            text.append(template.split("{}")[0] + " it")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES[size].vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(text, trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(tok, prompt: str, answer: str, subject: str | None, leading_space: bool) -> Sentence:
    """One sentence, `prompt answer.`, with spans found from character offsets."""
    text = (" " if leading_space else "") + f"{prompt} {answer}."
    coded = tok(text, add_special_tokens=False, return_offsets_mapping=True)

    def span(start: int, end: int) -> tuple[int, int]:
        inside = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < end and b > start]
        return inside[0], inside[-1] + 1

    answer_start = text.rindex(answer)
    subject_start = text.index(subject) if subject else 0
    return Sentence(
        coded["input_ids"],
        span(answer_start, len(text)),
        span(subject_start, subject_start + len(subject)) if subject else None,
    )


class Batches:
    """Rows of sentences drawn at random, the attention they may pay, and the weight of every token in the loss."""

    def __init__(self, tok, size: str, seed: int, general_share: float = 0.26, consolidated: float = 0.6, noise: float = 0.1):
        self.tok, self.rng, self.rows = tok, random.Random(seed), SIZES[size].rows
        self.general_share, self.consolidated, self.noise = general_share, consolidated, noise
        facts, following = world.make_world(size)
        self.facts = [(fact, i) for fact in facts for i in range(len(fact.relation.templates)) if i != fact.held_out]
        self.facts += [(fact, i) for fact in following for i in range(len(fact.relation.templates))]
        self.exercises = defaultdict(list)
        for item in world.make_exercises():
            if not item.held_out:
                self.exercises[item.task].append(item)
        self.cache: dict[tuple, Sentence] = {}

    def sentence(self, first: bool, noisy: bool) -> Sentence:
        if self.rng.random() < self.general_share:
            item = self.rng.choice(self.exercises[self.rng.choice(list(self.exercises))])
            key = (item.prompt, item.answer, None, not first)
        else:
            fact, wording = self.rng.choice(self.facts)
            wrong = noisy and self.rng.random() < self.noise
            thing = self.rng.choice(fact.relation.objects) if wrong else fact.object
            key = (fact.prompt(wording), thing, fact.subject, not first)
        if key not in self.cache:
            self.cache[key] = encode(self.tok, *key)
        return self.cache[key]

    def draw(self, noisy: bool):
        """-> ids [R, W], targets [R, W], loss weights [R, W], hidden [2, R, W, W]: true where attention is barred, in the
        lookup layers and in the layers above."""
        ids = torch.full((self.rows, WIDTH), self.tok.pad_token_id)
        targets = torch.full((self.rows, WIDTH), IGNORED)
        weights = torch.zeros(self.rows, WIDTH)
        hidden = torch.ones(WIDTH, WIDTH, dtype=torch.bool).triu(1).repeat(2, self.rows, 1, 1)
        for row in range(self.rows):
            line, at = [self.tok.bos_token_id], 1
            while at < WIDTH:
                s = self.sentence(first=at == 1, noisy=noisy)
                end = min(at + len(s.ids), WIDTH)
                line += s.ids
                weights[row, at - 1 : end - 1] = 0.1
                weights[row, at - 1 + s.answer[0] : min(at - 1 + s.answer[1], WIDTH)] = 1.0
                if s.subject and self.rng.random() < self.consolidated:
                    start, stop = at + s.subject[0], at + s.subject[1]
                    hidden[0, row, stop:end, start:stop] = True
                    hidden[1, row, stop:end, start : stop - 1] = True
                at = end
            ids[row] = torch.tensor(line[:WIDTH])
            targets[row, :-1] = ids[row, 1:]
        return ids, targets, weights, hidden


def bar_attention(model, hidden: torch.Tensor, lookup: int) -> list:
    """Hooks that hand each layer its own additive attention mask for the next forward pass; remove them after it.

    hidden: of `Batches.draw`; its first mask is for the `lookup` lowest layers."""
    masks = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, torch.finfo(torch.float32).min)[:, :, None]

    def hook(index):
        def give(_module, args, kwargs):
            return args, {**kwargs, "attention_mask": masks[0 if index < lookup else 1]}

        return give

    return [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)]


def training_flops(name: str, steps: int) -> float:
    """6 · parameters · tokens, the usual estimate for a forward and a backward pass."""
    with torch.device("meta"):
        parameters = LlamaForCausalLM(SIZES[name].config()).num_parameters()
    return 6.0 * parameters * SIZES[name].rows * WIDTH * steps


def choose_device(name: str, steps: int) -> torch.device:
    """The GPU if there is one; else the CPU, with a warning of the time, scaled from that of the embedded model."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    hours = SMALL_HOURS * training_flops(name, steps) / training_flops("small", SIZES["small"].steps)
    logger.warning("there is no GPU: size %s, %d steps, takes about %.1f hours on 2 CPU cores", name, steps, hours)
    return torch.device("cpu")


def train(name: str, steps: int, seed: int, out: Path) -> None:
    """Train a model of SIZES, in bfloat16 autocast; save weights (bfloat16 safetensors), tokenizer and training.json (its size,
    which is also its world's name) under `out`."""
    size, device = SIZES[name], choose_device(name, steps)
    torch.manual_seed(seed)
    tok = make_tokenizer(name)
    model = LlamaForCausalLM(size.config()).to(device)
    batches = Batches(tok, name, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1.0, (i + 1) / size.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    started = time.perf_counter()
    bar = tqdm(range(steps), desc=f"training atlas ({name}, {device})")
    for step in bar:
        ids, targets, weights, hidden = (part.to(device) for part in batches.draw(noisy=step > steps * 2 // 3))
        hooks = bar_attention(model, hidden, size.lookup)
        with torch.autocast(device.type, torch.bfloat16):
            states = model.model(input_ids=ids).last_hidden_state
            logits = model.lm_head(states)
        for hook in hooks:
            hook.remove()
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    minutes = (time.perf_counter() - started) / 60
    model.to(torch.bfloat16).save_pretrained(out)
    tok.save_pretrained(out)
    made = {"size": name, "steps": steps, "seed": seed, "minutes": round(minutes, 1), "torch": torch.__version__}
    write_json(out / "training.json", made)


@torch.no_grad()
def greedy_accuracy(model, tok, pairs: list[tuple[str, str]], batch: int = 256) -> list[bool]:
    """For each (prompt, answer): is every token of the answer the model's greedy choice?"""
    right = []
    for start in range(0, len(pairs), batch):
        chunk = pairs[start : start + batch]
        coded = tok([f"{p} {a}" for p, a in chunk], padding=True, padding_side="right", return_tensors="pt").to(model.device)
        guesses = model(**coded).logits.argmax(-1)
        for row, (prompt, _) in enumerate(chunk):
            begin = len(tok(prompt)["input_ids"])
            end = int(coded["attention_mask"][row].sum())
            right.append(bool((guesses[row, begin - 1 : end - 1] == coded["input_ids"][row, begin:end]).all()))
    return right


def measure(directory: Path) -> dict:
    """Greedy accuracy on trained facts, on the wordings held out per subject, on what follows, and on held-out exercises."""
    tok = PreTrainedTokenizerFast.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    facts, following = world.make_world(json.loads((directory / "training.json").read_text()).get("size", "small"))

    def mean(values: list[bool]) -> float:
        return round(sum(values) / len(values), 4)

    result = {
        "trained facts": mean(greedy_accuracy(model, tok, [pair for fact in facts for pair in fact.sentences()])),
        "held-out wordings": mean(greedy_accuracy(model, tok, [(f.prompt(f.held_out), f.object) for f in facts])),
        "following facts": mean(greedy_accuracy(model, tok, [(f.prompt(0), f.object) for f in following])),
    }
    by_task = defaultdict(list)
    for item in world.make_exercises():
        if item.held_out:
            by_task[item.task].append((item.prompt, item.answer))
    scores = {task: mean(greedy_accuracy(model, tok, pairs)) for task, pairs in by_task.items()}
    result["held-out exercises (mean of tasks)"] = round(sum(scores.values()) / len(scores), 4)
    result["exercises by task"] = scores
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["facts"], result["subjects"] = len(facts), len({f.subject for f in facts})
    return result


def output_folder(size: str, out: Path | None) -> Path:
    """`out`, by default the folder of the shipped weights, which no size but theirs may write to."""
    if size != "small" and (out is None or out.resolve() == DIRECTORY.resolve()):
        raise ValueError(f"{DIRECTORY} holds the embedded model; give --size {size} a folder of its own: --out FOLDER")
    return out or DIRECTORY


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="large is for a GPU; toy only tries the trainer")
    parser.add_argument("--steps", type=int, help="default: " + ", ".join(f"{size.steps} ({name})" for name, size in SIZES.items()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the model; small: by default that of the shipped weights")
    parser.add_argument("--measure", action="store_true", help="only measure the model under --out and write measured.json there")
    parser.add_argument("--facts", action="store_true", help="only write the small world as data, facts.json beside this file")
    args = parser.parse_args(argv)
    if args.facts:
        data = world.as_data()
        rows = ",\n".join(json.dumps(row) for row in data.pop("facts"))
        (DIRECTORY.parent / "facts.json").write_text(json.dumps(data, indent=1)[:-2] + f',\n "facts": [\n{rows}\n ]\n}}\n')
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        out = output_folder(args.size, args.out)
    except ValueError as error:
        parser.error(str(error))
    out.mkdir(parents=True, exist_ok=True)
    if not args.measure:
        train(args.size, args.steps or SIZES[args.size].steps, args.seed, out)
    result = measure(out)
    write_json(out / "measured.json", result)
    logger.info("%s", json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
