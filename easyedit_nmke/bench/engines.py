"""One edit by each engine, on the same bed, with its time and peak memory by phase.

`Ours` is this package as users call it, `Plain` the equations as they stand (dense float64 solves, every token at every step,
the reference attribution), `EasyEdit` its own functions, given the same templates, projector, covariance and past keys.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from ..easyedit.foreign import FAMILY_WORDS, Enclosure
from ..easyedit.register import easyedit_method, easyedit_scorer
from ..history.state import LifelongState
from ..methods import apply_to_model, method_of
from ..methods.contract import apply_method
from ..methods.keys import Contexts, key_and_value, keys_of
from ..methods.nmke import neuron_masks
from ..methods.solver import CovarianceSolver
from ..methods.values import target_values
from ..models.arch import evaluating
from ..models.device import free_memory, synchronise
from ..models.requests import Request
from ..scores import metrics
from .machine import Clock, Measured, held_memory
from .shapes import Bed

CANNOT_RUN = (ValueError, ImportError, RuntimeError, MemoryError, FloatingPointError)
REFERENCE_WORK = {"cpu": 2e13, "cuda": 1e15}  # products of the plain engine in one edit, beyond which it is left out


class Ours:
    """This package: NMKE, AlphaEdit or MEMIT with `settings`. `solvers` may be shared, and hold the past keys."""

    limit: int | None = None  # edits measured at most
    every = True  # measured with every number of past edits, not with the first alone

    def __init__(self, bed: Bed, method: str, solvers: Mapping, name: str | None = None, **settings):
        self.bed, self.method, self.name = bed, method, name or method
        self.hparams = bed.hparams(method, **settings)
        self.solvers, self.needs_past, self._cache = solvers, method != "MEMIT", None

    def prepare(self, count: int) -> None:
        """`count` past keys for the edits to come."""
        self.count = count
        for layer, solver in self.solvers.items() if self.needs_past else ():
            solver.truncate(min(count, solver.count))
            if solver.count < count:
                solver.append(self.bed.past(layer, count)[:, solver.count :])

    def edit(self, request: Request) -> Measured:
        state = LifelongState(self.hparams.state_settings(), self.solvers, self.bed.templates)
        state.attribution_cache = self._cache
        state.follow(method_of(self.hparams).matrices(self.bed.model, self.hparams))  # what a first edit does once is not measured
        held, processor = held_memory(), time.process_time()
        synchronise()
        started = time.perf_counter()
        self._write(request, state)
        synchronise()
        total, processor = time.perf_counter() - started, time.process_time() - processor
        report, self._cache = state.reports[-1], state.attribution_cache
        seconds = {**report.seconds, "rest": total - sum(report.seconds.values())}
        memory = {name: peak - held for name, peak in report.peak_memory.items()}
        for solver in self.solvers.values() if self.needs_past else ():
            solver.truncate(self.count)
        return Measured(total, seconds, memory, processor, state.masks)

    def _write(self, request: Request, state: LifelongState) -> None:
        apply_to_model(self.bed.model, self.bed.tok, [request], self.hparams, state=state)

    def evaluate(self, request: Request) -> None:
        metrics.quality(self.bed.model, self.bed.tok, [request])


class Together(Ours):
    """AlphaEdit's update for `count` requests at once, its cost that of one of them; `alone`: each value is solved by itself."""

    limit, every = 1, False

    def __init__(self, bed: Bed, solvers: Mapping, count: int, alone: bool = False):
        super().__init__(bed, "AlphaEdit", solvers, f"AlphaEdit, {count} at once{', values alone' if alone else ''}")
        self.method, self.requests, self.alone = "AlphaEdit at once", bed.requests[:count], alone

    def edit(self, request: Request) -> Measured:
        run, count = super().edit(request), len(self.requests)
        seconds = {name: part / count for name, part in run.seconds.items()}
        return Measured(run.total / count, seconds, run.memory, run.processor / count, run.masks)

    def _write(self, request: Request, state: LifelongState) -> None:
        bed, method, edit = self.bed, method_of(self.hparams), None
        if self.alone:
            with evaluating(bed.model):
                args = (bed.flat_templates, bed.layers[-1], self.hparams)
                values = [target_values(bed.view, bed.tok, [one], *args)[0].z for one in self.requests]
            edit = partial(method.replay, z=torch.stack(values, 1))
        apply_method(method, bed.model, bed.tok, self.requests, self.hparams, state=state, edit=edit)


class Plain:
    """AlphaEdit or NMKE as their equations stand; float64 in the solve."""

    limit, needs_past = 1, True

    def __init__(self, bed: Bed, method: str):
        self.bed, self.method, self.name, self.every = bed, method, f"{method}, plain", method != "NMKE"
        self.hparams = bed.hparams(method, **({"attribution_backend": "reference"} if method == "NMKE" else {}))

    @staticmethod
    def work(bed: Bed, method: str) -> float:
        """Products and sums of one edit's solves and attribution."""
        hidden, neurons = bed.view.w_out(bed.layers[0]).shape
        words = len(bed.view.head.weight)
        attribution = 2 * len(bed.flat_templates) * neurons * hidden * words if method == "NMKE" else 0
        return len(bed.layers) * (2 * neurons**3 + attribution)

    def prepare(self, count: int) -> None:
        self.count = count

    @torch.no_grad()
    def edit(self, request: Request) -> Measured:
        bed, clock, z_layer = self.bed, Clock(), self.bed.layers[-1]
        contexts, args = Contexts(bed.templates), (bed.view, bed.tok, [request])
        with evaluating(bed.model):
            with clock.phase("values"):
                (value,) = target_values(*args, bed.flat_templates, z_layer, self.hparams, whole_texts=True)
            masks = {}
            if self.method == "NMKE":
                with clock.phase("attribution"):
                    masks = neuron_masks(*args, bed.flat_templates, self.hparams)
            for index, layer in enumerate(bed.layers):
                with clock.phase("keys"):
                    keys, current = key_and_value(*args, contexts, layer, z_layer)
                with clock.phase("solve"):
                    residual = (value.z[:, None] - current) / (len(bed.layers) - index)
                    update = self._solve(layer, keys.double(), residual.double())
                    if layer in masks:
                        update *= masks[layer].mask[:, None].to(update)
                with clock.phase("apply"):
                    weight = bed.view.w_out(layer)
                    weight += update.T.to(weight)
            with clock.phase("keys"):
                keys_of(*args, contexts, bed.layers)
        return clock.measured({layer: mask.mask != 0 for layer, mask in masks.items()})

    def _solve(self, layer: int, keys: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """X [F, D] float64."""
        past, basis = self.bed.past(layer, self.count).double(), self.bed.bases[layer].double()

        def project(matrix):
            return matrix - basis @ (basis.T @ matrix)

        system = project(keys @ keys.T + past @ past.T)
        system.diagonal().add_(self.bed.l2)
        return torch.linalg.solve(system, project(keys) @ residual.T)

    def evaluate(self, request: Request) -> None:
        metrics.quality(self.bed.model, self.bed.tok, [request])


class EasyEdit:
    """EasyEdit's own AlphaEdit or MEMIT. ImportError where there is no checkout, ValueError where its matrices do not fit."""

    limit, every = None, True
    MODULES = ("rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module")

    def __init__(self, bed: Bed, method: str):
        _, found, kind = easyedit_method(method)
        self.bed, self.method, self.name, self.needs_past = bed, method, f"EasyEdit's {method}", method != "MEMIT"
        self._check_fits()
        self.apply = getattr(found, "easyedits_own", found)
        self.main, self.score = sys.modules[self.apply.__module__], easyedit_scorer()
        self._inside = Enclosure(method, bed.tok, bed.seed)
        content = {**vars(bed.hparams(method)), **self._modules(), "stats_dir": "", "v_loss_layer": bed.view.depth - 1}
        self.hparams = kind(**{name: value for name, value in content.items() if name in kind.__dataclass_fields__})
        self.hparams.model_name = FAMILY_WORDS.get(bed.model.config.model_type, bed.model.config.model_type)
        if self.needs_past:
            self.hparams.P_loc = self.main.__file__  # has to exist, and is not read: P is put in its place
        self._matrices = {}

    def _check_fits(self) -> None:
        size = (2 if self.needs_past else 1) * len(self.bed.layers) * self.bed.neurons**2 * 4
        free = free_memory(torch.device("cpu"))
        if size > free:
            raise ValueError(f"its matrices take {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")

    def _modules(self) -> dict[str, str]:
        family, view = self.bed.view.family, self.bed.view
        names = {id(module): name for name, module in view.model.named_modules()}
        paths = [f"{family.blocks}.{{}}.{family.down}", f"{family.blocks}.{{}}", f"{family.blocks}.{{}}.mlp", "", family.norm, ""]
        tied = view.head.weight is view.model.get_input_embeddings().weight
        paths[-1] = names[id(view.model.get_input_embeddings() if tied else view.head)]
        return dict(zip(self.MODULES, paths, strict=True))

    def templates(self) -> Measured:
        """Its own context templates, made once for a model."""
        clock = Clock()
        with self._inside, clock.phase("templates"):
            self.main.get_context_templates(self.bed.model, self.bed.tok)
        return clock.measured()

    def prepare(self, count: int) -> None:
        self.count = count
        if not self.needs_past:
            self._matrices = self._matrices or {layer: self.bed.moment(layer) for layer in self.bed.layers}
        elif not self._matrices:
            self._matrices = {"P": torch.stack([_projector(self.bed.bases[layer]) for layer in self.bed.layers])}
        self._remember()

    def _remember(self) -> None:
        """cache_c = K Kᵀ of the past keys."""
        if self.needs_past:
            past = [self.bed.past(layer, self.count) for layer in self.bed.layers]
            self._matrices["cache_c"] = torch.stack([(keys @ keys.T).cpu() for keys in past])

    def edit(self, request: Request) -> Measured:
        clock, record = Clock(), request.to_dict()
        with self._inside, self._replaced(clock), evaluating(self.bed.model):
            if self.needs_past:
                vars(self.main).update(P_loaded=True, cache_c_new=True, **self._matrices)
            with clock.phase("apply"):
                self.apply(
                    self.bed.model, self.bed.tok, [record], self.hparams, copy=False, return_orig_weights=True,
                    keep_original_weight=False,
                )  # fmt: skip
        self._remember()
        return clock.measured()

    @contextmanager
    def _replaced(self, clock: Clock) -> Iterator[None]:
        """Its functions with a clock, and the bed's templates and covariance in place of its own."""
        main, bed = self.main, self.bed
        phases = {"compute_z": "values", "compute_ks": "keys", "get_module_input_output_at_words": "keys"}
        inner = next(name for name in ("execute_AlphaEdit", "execute_memit") if hasattr(main, name))
        new = {name: clock.timed(phase, getattr(main, name)) for name, phase in {**phases, inner: "solve"}.items()}
        new["get_context_templates"] = lambda *_: bed.templates
        new["get_cov"] = lambda _model, _tok, name, *_, **__: next(
            self._matrices[layer] for layer in bed.layers if name == self.hparams.rewrite_module_tmp.format(layer)
        )
        old = {name: getattr(main, name) for name in new}
        vars(main).update(new)
        try:
            yield
        finally:
            vars(main).update(old)

    def evaluate(self, request: Request) -> None:
        with self._inside, torch.no_grad():
            self.score(self.bed.model, self.hparams.model_name, self.hparams, self.bed.tok, request.to_dict(), str(self.bed.device))


def _projector(basis: torch.Tensor) -> torch.Tensor:
    """I - U Uᵀ, where EasyEdit keeps it."""
    projector = -(basis @ basis.T)
    projector.diagonal().add_(1)
    return projector.cpu()


def covariance_solvers(bed: Bed) -> dict[int, CovarianceSolver]:
    weight = bed.hparams("MEMIT").mom2_update_weight
    return {layer: CovarianceSolver(bed.moment(layer), weight) for layer in bed.layers}
