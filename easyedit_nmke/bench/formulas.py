"""What an edit will cost on a device that is not at hand: operations, bytes, launches, waits and memory by phase, from formulas.

They follow the code of each phase, one request an edit; tests hold them against counts on tiny models of each architecture. Seconds
are a roofline: products at the device's rate and exponentials after them, or bytes at its bandwidth, or launches, whichever takes
longest, and waits; on a CPU, which does one thing at a time, all of them. No kernel reaches its rate or bandwidth everywhere, so
they are rather too few than too many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..attribution import fast
from ..attribution.cached import REFRESH_EVERY, SAMPLED_WORDS
from ..methods.above import FEW
from ..methods.ridge import STEP, SWITCH, block_height
from ..methods.value_texts import SUBJECT, TARGET, Batch, Row
from ..methods.values import TIMES_HEADS, TIMES_HIDDEN, TIMES_NEURONS, TIMES_WORDS
from ..models.updates import block_rows, chunks_of
from .cards import Card
from .shapes import TEMPLATE_LENGTH

PHASES = ("values", "attribution", "keys", "solve", "apply", "rest")
UNIT, PRECISE = 128, "float64"

# Launches of a block: of a forward pass, and of the backward pass of a value's step.
LAUNCHES = {"llama": (39, 63), "qwen2": (39, 63), "gpt2": (20, 25), "gemma3_text": (69, 109)}
HOOKED = 5  # more where an FFN skips tokens and attention's keys and values are continued
SKIPPING = (3, 4)  # of these, and of the backward pass, for the former
SETUP, FORWARD, BACKWARD = 62, 54, 57  # of a value: once, and of its steps what is in no block
POST_NORM = 200  # more for an update that has to go through a norm (`PostNorm.change`)


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder: states D, neurons F, words V, blocks, attention heads, those of keys and values, and their width."""

    kind: str
    hidden: int
    neurons: int
    words: int
    depth: int
    heads: int
    shared: int
    head: int
    tied: bool

    @classmethod
    def of(cls, config) -> Model:
        """From transformers' configuration."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        neurons = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        return cls(
            config.model_type, hidden, neurons, config.vocab_size, config.num_hidden_layers, heads,
            getattr(config, "num_key_value_heads", None) or heads, getattr(config, "head_dim", None) or hidden // heads,
            config.tie_word_embeddings,
        )  # fmt: skip

    @property
    def attention(self) -> int:
        """Weights of a block's attention."""
        return 2 * self.hidden * self.head * (self.heads + self.shared)

    @property
    def ffn(self) -> int:
        return (2 if self.kind.startswith("gpt") else 3) * self.hidden * self.neurons

    @property
    def parameters(self) -> int:
        """But norms and biases."""
        return self.depth * (self.attention + self.ffn) + (1 if self.tied else 2) * self.words * self.hidden


@dataclass(frozen=True)
class Texts:
    """What one request is edited with, in tokens: the rows of its value, the texts of its key up to the subject's last token (each
    once), the prompts that are attributed."""

    rows: Sequence[Row]
    keys: Sequence[int]
    prompts: Sequence[int]

    @classmethod
    def usual(cls, templates: int = 5, subject: int = 3, prompt: int = 8, target: int = 2) -> Texts:
        """A subject of three tokens in front of a prompt of eight, two of the target, templates of TEMPLATE_LENGTH and a stop."""
        before = [0] + [TEMPLATE_LENGTH + 1] * templates
        rows = [
            Row(TARGET, 0, [1] * (at + prompt + target - 1), at + subject - 1, at + prompt + target - 1, i, [1] * target)
            for i, at in enumerate(before)
        ]
        about = Row(SUBJECT, 0, [1] * subject, subject - 1, subject)
        return cls([*rows, about], [at + subject for at in before], [at + prompt for at in before])


@dataclass(frozen=True)
class Work:
    """What a phase does: products (FLOP, in `precision`), bytes to and from memory, exponentials, launches, waits."""

    precision: str
    flops: float = 0.0
    bytes: float = 0.0
    exponentials: float = 0.0
    launches: float = 0.0
    waits: float = 0.0

    def seconds(self, card: Card) -> float:
        computing = self.flops / card.rates[self.precision] + self.exponentials / card.exponentials
        moving, launching, waiting = self.bytes / card.bandwidth, self.launches * card.launch, self.waits * card.wait
        together = max if card.overlaps else lambda *parts: sum(parts)
        return together(computing, moving, launching) + waiting


@dataclass(frozen=True)
class Edit:
    """One edit of one request: what its phases do, and what memory they take. past: keys remembered; rank: directions protected;
    backend: of the attribution, None for AlphaEdit; cuda: with the block sizes of a GPU."""

    model: Model
    texts: Texts
    layers: Sequence[int]
    steps: int
    past: int
    rank: int
    dtype: str = "bfloat16"
    backend: str | None = "fused"
    cuda: bool = True

    @property
    def size(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def above(self) -> int:
        """Blocks that a value's steps run."""
        return self.model.depth - 1 - self.layers[-1]

    @property
    def matrix(self) -> int:
        """Weights of a layer that are edited."""
        return self.model.hidden * self.model.neurons

    @cached_property
    def batch(self) -> Batch:
        return Batch(self.texts.rows, 1 + max(row.template for row in self.texts.rows), "cpu")

    def work(self) -> dict[str, Work]:
        """By phase."""
        found = {name: getattr(self, name)() for name in PHASES if name != "attribution" or self.backend}
        return {name: found[name] for name in found}

    # ---- phases

    def values(self) -> Work:
        """A pass over everything, then `steps` forward and one backward less, of what is above and depends on the value."""
        m, batch = self.model, self.batch
        rows, width, columns = len(batch.rows), batch.width, batch.columns
        real, read = int(batch.mask[:, batch.start :].sum()), len(batch.read)
        whole, before = int(batch.mask.sum()), int(batch.mask[:, : batch.start].sum())
        first = 2 * m.depth * rows * width * m.attention + self._attending(rows, width, width, m.depth)
        first += 2 * m.ffn * (whole * (self.layers[-1] + 1) + before * (self.above - 1))
        few = self.cuda and rows * columns <= FEW  # every FFN is computed for all of them
        ffns = self.above * rows * columns if few else real * (self.above - 1) + read
        linear = 2 * self.above * rows * columns * m.attention + 2 * m.ffn * ffns
        linear += 2 * read * m.hidden * m.words
        attending = self._attending(rows, columns, width, self.above)
        forward, backward = self.steps, self.steps - 1
        weights = self.above * (m.attention + m.ffn) + m.words * m.hidden
        kept = rows * columns * self._token() + 2 * TIMES_WORDS * 4 * read * m.words
        block, back = self._launches
        step, back = (block + HOOKED - SKIPPING[0], back - SKIPPING[1]) if few else (block + HOOKED, back)
        return Work(
            self.dtype,
            first + forward * (linear + attending) + backward * (linear + 2.5 * attending),  # attention's scores are made again
            self.size * (m.depth * (m.attention + m.ffn) + (forward + backward) * weights) + (forward + 2 * backward) * kept,
            forward * rows * m.heads * columns * width * self.above,
            SETUP + forward * FORWARD + backward * BACKWARD
            + (block + HOOKED) * m.depth + (step * forward + back * backward) * self.above,
            8 + self.steps,
        )  # fmt: skip

    def attribution(self) -> Work:
        """A pass over the prompts, then of every layer the logits of all perturbed states."""
        m, prompts, width = self.model, len(self.texts.prompts), max(self.texts.prompts)
        logits, layers = prompts * m.neurons * m.words, len(self.layers)
        flops = 2 * m.depth * prompts * width * (m.attention + m.ffn) + self._attending(prompts, width, width, m.depth)
        flops += 2 * prompts * m.hidden * m.words + layers * 2 * prompts * m.hidden * m.words
        read = self.size * (m.parameters + layers * m.words * m.hidden)
        pending = min(self.past, REFRESH_EVERY) / 2  # on average
        if self.backend == "cached":
            flops += layers * 2 * (pending * m.neurons * (m.words + prompts) + m.hidden * (m.words + SAMPLED_WORDS * m.neurons))
            read += layers * self.size * (m.neurons * m.words + 2 * self.matrix)
            read += layers * 4 * pending * (m.words + m.neurons)
        else:
            flops += layers * 2 * self.matrix * (m.words + prompts)
            read += layers * self.size * (m.words * m.hidden + self.matrix)
        if self.cuda:  # sums of UNIT words are written, and read three times
            read += layers * 4 * 4 * prompts * m.neurons * m.words / UNIT
        return Work(self.dtype, flops, read, layers * logits, *self._attribution_launches(prompts))

    def keys(self) -> Work:
        """A pass up to the last edited layer, and one more from each layer edited to it."""
        m, rows, width, real = self.model, len(self.texts.keys), max(self.texts.keys), sum(self.texts.keys)
        last, block = self.layers[-1], self._launches[0]
        starts = [0, *self.layers[:-1]]
        blocks = sum(last + 1 - start for start in starts)
        ffns = 2 * m.ffn * (real * (blocks - len(starts)) + rows * len(starts))
        return Work(
            self.dtype,
            2 * blocks * rows * width * m.attention + self._attending(rows, width, width, blocks) + ffns,
            self.size * blocks * (m.attention + m.ffn) + blocks * real * 12 * self.size * m.hidden,
            blocks * rows * m.heads * width**2,
            blocks * (block + 3) + 30 * len(starts),
            2,
        )

    def solve(self) -> Work:
        """`NullSpaceSolver.directions`: the key projected, and the past keys' part taken off it; what the FFN has to put out."""
        flops, moved, launches = self._ridge(reads=2)
        layers = len(self.layers)
        launches += 34 + (POST_NORM if self.model.kind.startswith("gemma") else 0)
        return Work(PRECISE, layers * flops, layers * moved, 0, layers * launches, 3 * layers)

    def apply(self) -> Work:
        """The update added to the weight, block by block."""
        m, layers = self.model, len(self.layers)
        blocks = math.ceil(m.hidden / block_rows(m.neurons, self.cuda))
        return Work("float32", 0, layers * self.matrix * (32 + 5 * self.size), 0, layers * (4 * blocks + 7), layers)

    def rest(self) -> Work:
        """Checks, copies in case of failure, two fingerprints, the key remembered, 16-bit weights' masters."""
        m, layers, half = self.model, len(self.layers), self.size < 4
        flops, moved, launches = self._ridge(reads=1)
        blocks = math.ceil(m.hidden / block_rows(m.neurons, self.cuda))
        chunks = chunks_of(self.matrix * self.size)
        moved += self.matrix * (2 * self.size + 3 * self.size + 2 * 4 * self.size + (24 if half else 0))
        launches += 40 + 2 * 2 * chunks + (5 * blocks if half else 0)
        return Work(PRECISE, layers * flops, layers * moved, 0, 20 + layers * (launches + 8), 5 + 6 * layers)

    # ---- memory

    def held(self) -> dict[str, float]:
        """Bytes between edits: weights, what solvers hold, masters of 16-bit weights, kept products of attribution."""
        m, layers = self.model, len(self.layers)
        room = 0 if not self.past else max(16, 1 << (self.past - 1).bit_length())
        return {
            "weights": m.parameters * self.size,
            "null space": layers * 4 * m.neurons * self.rank,
            "past keys": layers * (4 * room * m.neurons + 8 * room**2),
            "masters": layers * 4 * self.matrix if self.size < 4 else 0,
            "attribution": layers * self.cached() if self.backend == "cached" else 0,
        }

    def cached(self) -> float:
        """Bytes that the attribution keeps of a layer, pending columns included."""
        m = self.model
        return self.size * m.neurons * m.words + 4 * REFRESH_EVERY * (m.neurons + m.words)

    def memory(self) -> dict[str, float]:
        """Most bytes of each phase, above what is held."""
        m, batch, prompts = self.model, self.batch, len(self.texts.prompts)
        copies = len(self.layers) * self.matrix * self.size
        kept = len(batch.rows) * batch.width * m.depth * 2 * m.head * m.shared * self.size + 4 * m.words * 2
        scratch = 8 * 2 * max(block_height(width, self.cuda) * width for width in (self.rank or 1, m.neurons))
        scratch = min(scratch, 8 * m.neurons * max(self.rank, self.past, 1))
        found = {
            "values": kept + len(batch.rows) * batch.columns * self._token() + len(batch.read) * TIMES_WORDS * 4 * m.words,
            "attribution": self._pass(prompts, max(self.texts.prompts)) + max(8 * prompts * m.words, self._scoring(prompts)),
            "keys": self._pass(len(self.texts.keys), max(self.texts.keys)),
            "solve": scratch + 8 * 8 * m.neurons,
            "apply": 8 * min(block_rows(m.neurons, self.cuda) * m.neurons, self.matrix) + self.matrix * (3 + self.size),
            "rest": 2 * 8 * chunks_of(self.matrix * self.size, whole=True) + scratch,
        }
        return {name: copies + found[name] for name in PHASES if name != "attribution" or self.backend}

    def peak(self) -> float:
        return sum(self.held().values()) + max(self.memory().values())

    # ---- parts

    @property
    def _launches(self) -> tuple[int, int]:
        return LAUNCHES.get(self.model.kind, LAUNCHES["llama"])

    def _attending(self, rows: int, columns: int, width: int, blocks: int) -> float:
        """Scores and weighted sums."""
        return 4 * blocks * rows * columns * width * self.model.heads * self.model.head

    def _token(self) -> float:
        """Bytes that the backward pass needs of a token."""
        m = self.model
        inner = self.size * (TIMES_NEURONS * m.neurons + TIMES_HEADS * m.heads * m.head)
        return self.above * (inner + max(self.size, 4) * TIMES_HIDDEN * m.hidden)

    def _pass(self, rows: int, width: int) -> float:
        """Bytes of a pass without gradients."""
        m = self.model
        return rows * width * (self.size * 3 * m.neurons + 4 * 6 * m.hidden) + 4 * len(self.layers) * rows * (m.neurons + m.hidden)

    def _scoring(self, prompts: int) -> float:
        m = self.model
        if self.cuda:
            sums = 8 * math.ceil(m.words / UNIT) * prompts * m.neurons
            return sums + 4 * prompts * (5 * m.words + 8 * m.neurons) + self.size * self.matrix + 12 * 1024 * m.hidden
        width, words = min(m.neurons, fast.CPU_BLOCK[0]), min(m.words, fast.CPU_BLOCK[1])
        states = prompts * (14 * m.neurons + 8 * words + 4 * m.hidden)
        return min(fast.CPU_BUDGET, 4 * (states + 3 * m.hidden * width + 2 * words * m.hidden + 4 * width * words))

    def _ridge(self, reads: int) -> tuple[float, float, float]:
        """(FLOP, bytes, launches) of a layer's key, solved or remembered: the basis and the past keys' factor are read twice, the
        past keys `reads` times."""
        m, switch = self.model, SWITCH * self.model.neurons
        rest = self.past if self.past < switch else STEP * m.neurons / 2
        flops = 2 * m.neurons * (2 * self.rank + reads * rest + 1) + 4 * rest**2 + (2 * m.neurons**2 if self.past >= switch else 0)
        number = 20 if self.cuda else 4  # bytes: converted to float64 in memory, or in the cache
        moved = (
            number * m.neurons * (2 * self.rank + reads * rest) + 16 * rest**2 + (8 * m.neurons**2 if self.past >= switch else 0)
        )
        bases, past = (math.ceil(n / block_height(width, self.cuda)) for n, width in ((m.neurons, self.rank), (rest, m.neurons)))
        return flops, moved, 5 * bases + (5 * past if reads == 2 else 3 * past)

    def _attribution_launches(self, prompts: int) -> tuple[float, float]:
        """(launches, waits)."""
        m, (block, _) = self.model, self._launches
        if self.cuda:
            blocks, each = (
                0,
                170 + 3 * math.ceil(m.words / 4096) + (0 if self.backend == "cached" else 4 * math.ceil(m.neurons / 1024)),
            )
        else:
            words, neurons = math.ceil(m.words / fast.CPU_BLOCK[1]), math.ceil(m.neurons / fast.CPU_BLOCK[0])
            blocks = words * neurons
            each = 145 + 16 * words + blocks * (16 + 12 * prompts)
        return 34 + block * m.depth + len(self.layers) * each, 2 + len(self.layers) * (10 + blocks)
