"""The covariance of keys E[c cᵀ] over a text (MEMIT, ROME; AlphaEdit's null space is made of it): one pass, one file a layer.

Memory at F neurons, a layer: 0.56·F² numbers while summing (the upper triangle, in strips) and on disk; F² where it is used.
At 14336 neurons in float32 that is 462 MB and 822 MB: five layers are summed in one pass with 2.3 GB, besides a batch's
activations (at most 1 GB, on a GPU 4). In float64 a pass takes as many layers as SUMS allows. Of more than SHARD texts each shard
is summed by itself and the sums are added in order, in main memory, which holds as much again: whoever sums the shards, here or
on other machines, the bits are the same. What is summed so far is put on disk every ten minutes, and a pass that was stopped goes
on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..files import user_cache
from ..files import whole as whole_file
from ..models.arch import ModelView, evaluating
from ..models.device import free_memory
from ..models.hooks import record
from ..models.passes import batches
from ..models.products import exact_products, tf32_products
from ..models.prompts import pad, without_end
from ..models.updates import HALF, fingerprint
from .corpus import SELF, Corpus, corpus, identity, own_texts
from .making import Making, making_of, seconds_of

logger = logging.getLogger(__name__)

LONGEST_TEXT = 512  # tokens of one text that count; EasyEdit takes as many as the model can read
TOKENS_AT_A_TIME, CUDA_TOKENS = 4096, 8192  # on a GPU as many as a product needs to run at its rate
ACTIVATIONS, CUDA_ACTIVATIONS = 1.0e9, 4.0e9  # bytes that a batch may need
SUMS = 2.5e9  # bytes of sums in one pass
STRIPS = 8
TEXTS_AT_A_TIME = 256  # tokenised together, then batched by length
SHARD = 32 * TEXTS_AT_A_TIME  # texts that are summed by themselves
KEEP_EVERY = 600.0  # seconds, at least, between two times that the sums so far are put on disk


class SecondMoment:
    """Running Σ c cᵀ of keys c [F]: of its upper triangle alone, as STRIPS strips of rows, so at (1 + 1/STRIPS)/2 of the memory
    and of the work of the whole."""

    def __init__(self, neurons: int, dtype: torch.dtype, device):
        self.rows = -(-neurons // STRIPS)
        self.strips = [
            torch.zeros((min(self.rows, neurons - start), neurons - start), dtype=dtype, device=device)
            for start in range(0, neurons, self.rows)
        ]
        self.count = 0

    def add(self, keys: torch.Tensor) -> None:
        """keys [T, F]."""
        for index, strip in enumerate(self.strips):
            start = index * self.rows
            strip.addmm_(keys[:, start : start + self.rows].T, keys[:, start:])
        self.count += len(keys)

    def __iadd__(self, other: SecondMoment) -> SecondMoment:
        for strip, more in zip(self.strips, other.strips, strict=True):
            strip.add_(more)
        self.count += other.count
        return self

    def cpu(self) -> SecondMoment:
        """Itself, in main memory."""
        self.strips = [strip.cpu() for strip in self.strips]
        return self

    def means(self) -> list[torch.Tensor]:
        """The strips of E[c cᵀ], in place of those of the sum."""
        return [strip.div_(self.count) for strip in self.strips]


def whole(strips: Sequence[torch.Tensor]) -> torch.Tensor:
    """[F, F], symmetric, from the strips of its upper triangle."""
    neurons = strips[0].shape[1]
    full = strips[0].new_empty((neurons, neurons))
    for strip in strips:
        start = neurons - strip.shape[1]
        full[start : start + len(strip), start:] = strip
        full[start:, start : start + len(strip)] = strip.T
        square = strip[:, : len(strip)]  # on the diagonal; a product's two halves may differ by rounding
        full[start : start + len(strip), start : start + len(strip)] = (square + square.T) / 2
    return full


# ---- one pass over a text

# (shards of texts, layers, dtype) -> the sums of each shard, in order, by copies of the model
Elsewhere = Callable[[Iterable[list[str]], Sequence[int], torch.dtype], Iterable[dict[int, SecondMoment]]]


def covariances(
    view: ModelView, tok, texts: Iterable[str], layers: Sequence[int], dtype: torch.dtype = torch.float32
) -> dict[int, torch.Tensor]:
    """layer -> E[c cᵀ] [F, F] over all tokens of `texts`, summed in `dtype`; one pass serves all layers."""
    return {layer: whole(sums.means()) for layer, sums in key_sums(view, tok, texts, layers, dtype).items()}


def key_sums(
    view: ModelView,
    tok,
    texts: Iterable[str],
    layers: Sequence[int],
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    elsewhere: Elsewhere | None = None,
    kept: Path | None = None,
) -> dict[int, SecondMoment]:
    """layer -> the second moment of its keys over all tokens of `texts`, of which LONGEST_TEXT each count. Blocks above the last
    layer are not run. elsewhere: sums the shards of more than one; by default this process does. kept: the file of the sums so far,
    of this model and these texts; who called removes it. ValueError when the texts have fewer tokens than a layer has neurons, or
    a key is not finite."""
    total = len(texts) if hasattr(texts, "__len__") else None
    bar = tqdm(total=total, desc=f"covariance of keys {list(layers)}", unit=" texts", leave=False, disable=not progress)
    several = total is not None and total > SHARD
    sums, done = _kept_sums(kept) if kept else ({}, 0)
    bar.update(done * SHARD)
    shards = itertools.islice(_shards(texts), done, None)
    if elsewhere is None or not several:
        found = (shard_sums(view, tok, shard, layers, dtype, bar.update) for shard in shards)
    else:
        found = elsewhere(_told(shards, bar.update), layers, dtype)
    last = time.perf_counter()
    started = last - (making_of(kept).seconds if done else 0.0)
    with bar:
        for number, shard in enumerate(found, done + 1):
            if sums and shard:
                sums = {layer: moment.cpu() for layer, moment in sums.items()}
            for layer in list(shard):
                moment = shard.pop(layer)
                if layer in sums:
                    sums[layer] += moment.cpu()
                else:
                    sums[layer] = moment
            if kept and several and time.perf_counter() - last >= KEEP_EVERY:
                _keep(kept, sums, number, Making.since(started))
                last = time.perf_counter()
    if not sums:
        raise ValueError("the text for the covariance of keys is empty; give mom2_dataset a file with text in it")
    for layer, moment in sums.items():
        if not all(torch.isfinite(strip).all() for strip in moment.strips):
            raise ValueError(f"keys of layer {layer} are not finite; load the model in bfloat16 or float32")
        _check_count(moment.count, moment.strips[0].shape[1])
    return sums


def _keep(file: Path, sums: Mapping[int, SecondMoment], shards: int, making: Making) -> None:
    """The sums of so many shards."""
    tensors = {f"{layer}.{i}": strip.cpu() for layer, moment in sums.items() for i, strip in enumerate(moment.strips)}
    counts = {str(layer): moment.count for layer, moment in sums.items()}
    save(file, tensors, {**making.metadata(), "shards": str(shards), "tokens": json.dumps(counts)})


def _kept_sums(file: Path) -> tuple[dict[int, SecondMoment], int]:
    """(layer -> its sum so far, of how many shards); of none where the file is not there or cannot be read."""
    try:
        with safe_open(file, "pt") as content:
            said = content.metadata()
            shards, tokens = int(said["shards"]), {int(layer): int(count) for layer, count in json.loads(said["tokens"]).items()}
            strips = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return {}, 0
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s holds no sums of keys (%s); they are summed from the start", file, error)
        return {}, 0
    sums = {}
    for layer, count in tokens.items():
        first = strips[f"{layer}.0"]
        sums[layer] = SecondMoment(first.shape[1], first.dtype, "cpu")
        sums[layer].strips = [strips[f"{layer}.{i}"] for i in range(len(sums[layer].strips))]
        sums[layer].count = count
    return sums, shards


@exact_products()
@torch.no_grad()
def shard_sums(
    view: ModelView,
    tok,
    texts: Iterable[str],
    layers: Sequence[int],
    dtype: torch.dtype,
    tick: Callable[[int], Any] = lambda texts: None,
) -> dict[int, SecondMoment]:
    """layer -> the second moment of its keys over one shard; {} when its texts are empty. tick: told of texts that are done."""
    wanted = {str(layer): (view.down(layer), "input") for layer in layers}
    sums: dict[int, SecondMoment] = {}
    with evaluating(view.model):
        for batch in _batches(view, tok, texts, _tokens_at_a_time(view, layers)):
            tokens = pad(batch, view.device)
            with record(wanted, stop=True) as seen:
                view.model.base_model(**tokens.inputs(), use_cache=False)
            for layer in layers:
                states = seen.pop(str(layer))
                keys = states[tokens.mask.bool().to(states.device)].to(dtype)
                if layer not in sums:
                    sums[layer] = SecondMoment(keys.shape[1], dtype, keys.device)
                with tf32_products() if states.dtype in HALF else nullcontext():
                    sums[layer].add(keys)
            tick(len(batch))
    return sums


def _shards(texts: Iterable[str]) -> Iterator[list[str]]:
    """SHARD texts that are not blank, and another SHARD, ..."""
    texts = (text for text in texts if text.strip())
    while shard := list(itertools.islice(texts, SHARD)):
        yield shard


def _told(shards: Iterable[list[str]], tick: Callable[[int], Any]) -> Iterator[list[str]]:
    for shard in shards:
        yield shard
        tick(len(shard))


def _check_count(tokens: int, neurons: int) -> None:
    """Keys of fewer tokens span only a part of the layer: of the rest their covariance says that nothing is there to keep."""
    if tokens < neurons:
        raise ValueError(
            f"the text for the covariance of keys has {tokens} tokens for {neurons} neurons, which needs at least as many; "
            "raise mom2_n_samples, or give mom2_dataset a longer text"
        )


def _batches(view: ModelView, tok, texts: Iterable[str], budget: int) -> Iterator[list[list[int]]]:
    """Token ids of the texts, those of like length together; padded, a batch is within the budget (or of one text)."""
    limit = min(view.context_length or LONGEST_TEXT, LONGEST_TEXT)
    texts = (text for text in texts if text.strip())
    while some := list(itertools.islice(texts, TEXTS_AT_A_TIME)):
        rows = [without_end(tok, ids, text)[:limit] for ids, text in zip(tok(some)["input_ids"], some, strict=True)]
        rows = [row for row in rows if row]
        for batch in batches(view.model, [len(row) for row in rows], budget):
            yield [rows[i] for i in batch]


def _tokens_at_a_time(view: ModelView, layers: Sequence[int]) -> int:
    """Tokens of a batch, padding included, so that it fits its bytes and a quarter of the memory that is free. Counted: the
    keys of all layers, one FFN and its float copy, eight residual streams, one layer's attention weights."""
    weight = view.weight(layers[0])
    size, (width, neurons) = weight.element_size(), view.w_out(layers[0]).shape
    heads = getattr(view.model.config, "num_attention_heads", 0)
    each = neurons * (size * (len(layers) + 3) + 8) + 8 * size * width + heads * LONGEST_TEXT * (size + 4)
    most, room = (CUDA_TOKENS, CUDA_ACTIVATIONS) if weight.is_cuda else (TOKENS_AT_A_TIME, ACTIVATIONS)
    return int(min(most, min(room, free_memory(weight.device) / 4) // each))


# ---- files


def moments(
    view: ModelView, tok, hparams, progress: bool = True, spent: MutableMapping[str, float | None] | None = None
) -> dict[int, torch.Tensor]:
    """layer -> E[c cᵀ] [F, F] over `mom2_dataset`, of the model as it is now, on the layer's device. spent: told the seconds of the
    "covariance", as they were when it was made; None where its file does not tell."""
    made: dict[int, Making | None] = {}
    found = dict(each_moment(view, tok, hparams, moment_files(view, tok, hparams), progress, made))
    if spent is not None:
        spent["covariance"] = seconds_of(made.values())
    return found


def each_moment(
    view: ModelView,
    tok,
    hparams,
    files: Mapping[int, Path],
    progress: bool = True,
    made: dict[int, Making | None] | None = None,
    elsewhere: Elsewhere | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(layer, E[c cᵀ]) from `moment_files`, one at a time; those that do not exist are made first, in `mom2_dtype`. made: layer ->
    what it took to make it, now or once. elsewhere: as of `key_sums`."""
    made = {} if made is None else made
    made.update({layer: making_of(file) for layer, file in files.items()})
    dtype = getattr(torch, hparams.mom2_dtype)
    unsaved: dict[int, list[torch.Tensor]] = {}
    missing = [layer for layer, file in files.items() if not file.is_file()]
    started = time.perf_counter()
    texts = _texts(view, tok, hparams, progress) if missing else []
    for group in _passes(view, missing, dtype):
        kept = own_file("sums", group[0], [files[layer].name for layer in group], hparams)
        spared = making_of(kept) or Making(0, 0.0)
        sums = key_sums(view, tok, texts, group, dtype, progress, elsewhere, kept)
        making = Making.since(started - spared.seconds)
        for layer in group:
            made[layer] = making
            strips = [strip.cpu() for strip in sums.pop(layer).means()]
            if not save(files[layer], {str(index): strip for index, strip in enumerate(strips)}, making.metadata()):
                unsaved[layer] = strips
        with suppress(OSError):
            kept.unlink()
        started = time.perf_counter()
    for layer, file in files.items():
        strips = unsaved.pop(layer, None)
        neurons, device = view.w_out(layer).shape[1], view.weight(layer).device
        yield layer, (whole(strips) if strips else read_moment(file, neurons)).to(device)


def _texts(view: ModelView, tok, hparams, progress: bool) -> Sequence[str] | Corpus:
    if hparams.mom2_dataset == SELF:
        return own_texts(view.model, tok, hparams.mom2_n_samples, hparams.seed, progress)
    return corpus(hparams.mom2_dataset, hparams.mom2_n_samples)


def _passes(view: ModelView, layers: Sequence[int], dtype: torch.dtype) -> Iterator[Sequence[int]]:
    """The layers in groups whose sums fit SUMS together."""
    if layers:
        neurons = view.w_out(layers[0]).shape[1]
        each = neurons**2 * dtype.itemsize * (1 + 1 / STRIPS) / 2
        size = max(1, int(SUMS / each))
        yield from (layers[start : start + size] for start in range(0, len(layers), size))


def moment_files(view: ModelView, tok, hparams) -> dict[int, Path]:
    """layer -> the file of its covariance: EasyEdit's own where `stats_dir` has one, else ours, which may not exist yet.

    Ours are named by all that they depend on: weights up to the layer, tokenizer, text, samples, dtype. EasyEdit's by the name
    of the model alone; whether it is still the same model is for the user to know, so the log tells.
    """
    found = {layer: _easyedit_file(view, layer, hparams) for layer in hparams.layers}
    for layer, file in found.items():
        if file:
            logger.warning("covariance of keys of layer %d: EasyEdit's file %s is used, made for a model of this name", layer, file)
    own = [layer for layer in hparams.layers if not found[layer]]
    return {layer: found[layer] for layer in found if found[layer]} | _own_files(view, tok, hparams, own)


def _own_files(view: ModelView, tok, hparams, layers: Sequence[int]) -> dict[int, Path]:
    if not layers:
        return {}
    text = [identity(hparams.mom2_dataset), hparams.mom2_n_samples, hparams.mom2_dtype, LONGEST_TEXT, tokenizer_digest(tok)]
    if hparams.mom2_dataset == SELF:
        text += [hparams.seed, fingerprint(dict(view.model.named_parameters()))]
    blocks = view.blocks[: layers[-1] + 1]
    inside = {id(p) for module in (*view.blocks, view.norm) for p in module.parameters()}
    around = {name: p for name, p in view.model.base_model.named_parameters() if id(p) not in inside}
    weights = [fingerprint(around), *(fingerprint(dict(block.named_parameters())) for block in blocks)]
    return {layer: own_file("moment", layer, [weights[: layer + 2], *text], hparams) for layer in layers}


def own_file(kind: str, layer: int, parts: list, hparams) -> Path:
    """The file of `kind` that is named by `parts`."""
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return cache_directory(hparams) / f"{kind}_{layer}_{name}.safetensors"


def tokenizer_digest(tok) -> str:
    """A digest of what turns text into tokens; padding and truncation, which calls change, do not count."""
    backend = getattr(tok, "backend_tokenizer", None)
    if backend is None:
        content = [type(tok).__name__, sorted(tok.get_vocab().items())]
    else:
        content = {name: part for name, part in json.loads(backend.to_str()).items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _easyedit_file(view: ModelView, layer: int, hparams) -> Path | None:
    """{stats_dir}/{model}/{dataset}_stats/{module}_{precision}_mom2_{samples}.npz; the name of the model is the last part of its
    path, in older versions the whole of it."""
    name = getattr(view.model.config, "_name_or_path", "") or ""
    module = view.weight_name(layer).removesuffix(".weight")
    for model in dict.fromkeys((name.rsplit("/")[-1], name.replace("/", "_"))):
        for precision in dict.fromkeys((hparams.mom2_dtype, "float64", "float32")):
            file = cache_directory(hparams) / model / f"{hparams.mom2_dataset}_stats"
            file = file / f"{module}_{precision}_mom2_{hparams.mom2_n_samples}.npz"
            if model and file.is_file():
                return file
    return None


def read_moment(file: Path, neurons: int) -> torch.Tensor:
    """E[c cᵀ] [F, F] from a file of ours or of EasyEdit's. ValueError when it cannot be read, is of another shape, or (EasyEdit's,
    which tells) of fewer tokens than neurons."""
    try:
        if file.suffix == ".npz":
            with np.load(file) as content:
                count = int(content["mom2.count"])
                moment = torch.from_numpy(content["mom2.mom2"]).div_(count)
        else:
            strips = load_file(file)
            moment, count = whole([strips[str(index)] for index in range(len(strips))]), neurons
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"{file} is no covariance of keys ({error}); delete it, and it will be made again") from None
    if moment.shape != (neurons, neurons) or not torch.isfinite(moment).all():
        raise ValueError(f"{file} holds shape {tuple(moment.shape)}, expected {(neurons, neurons)} finite numbers; delete it")
    _check_count(count, neurons)
    return moment


def cache_directory(hparams) -> Path:
    """`stats_dir`, else the user's cache."""
    return Path(hparams.stats_dir) if hparams.stats_dir else user_cache()


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """All or nothing; a cache that cannot be written is only a warning, and False."""
    try:
        with whole_file(path) as temporary:
            save_file(dict(tensors), temporary, dict(metadata))
    except OSError as error:
        logger.warning("the statistics of keys were not cached in %s: %s", path.parent, error)
        return False
    return True
