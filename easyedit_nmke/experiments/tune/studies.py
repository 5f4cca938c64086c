"""Optuna's part: what is tried next, kept in a database that a later run goes on with."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...messages import how_to_install

Space = Mapping[str, "list | tuple[float, float]"]
Tick = Callable[[str], None]

STARTUP = 6  # trials before the sampler learns from them


class Tried(NamedTuple):
    """What a trial measured, with "score", None when it was ended; its reports, as `Watch` has them; how long it took."""

    found: dict | None
    reports: list[tuple[float, int]]
    seconds: float


@dataclass
class Watch:
    """Asked with (score so far, step) whether a trial goes on: not when it is behind the median of `whole`, the scores by step of
    the trials that were whole before; None: always. In whichever process the trial is made."""

    whole: Sequence[Mapping[int, float]] | None = None
    reports: list[tuple[float, int]] = field(default_factory=list)

    def __call__(self, score: float, step: int) -> bool:
        self.reports.append((score, step))
        if not self.whole:
            return True
        import optuna

        with _quiet(optuna):
            study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
            study.add_trials(optuna.trial.create_trial(value=0.0, intermediate_values=dict(steps)) for steps in self.whole)
            trial = study.ask()
            for each in self.reports:
                trial.report(*each)
            return not trial.should_prune()


class Search:
    """Trials of a space, each with what it measured. starts: tried first. prune: a trial that is behind the others' median at one
    of its steps ends there. seconds: how long trials took, those of earlier runs included."""

    def __init__(
        self, file: Path, name: str, space: Space, seed: int, starts: Sequence[Mapping[str, Any]] = (), prune: bool = False
    ):
        try:
            import optuna
        except ImportError:
            raise ImportError(f"nmke tune needs optuna: {how_to_install('tune')}") from None
        self.optuna, self.space, self.prune = optuna, space, prune
        file.parent.mkdir(parents=True, exist_ok=True)
        with _quiet(optuna):
            self.study = optuna.create_study(
                study_name=name, storage=f"sqlite:///{file.resolve()}", load_if_exists=True, direction="maximize"
            )
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed + len(self.study.trials), multivariate=True, n_startup_trials=STARTUP
            )
            for start in starts:  # also again, where the trial of one was cut off
                known = {name: self._stored(name, value) for name, value in start.items() if self._has(name, value)}
                if not any(known.items() <= trial.items() for trial in self._kept()):
                    self.study.enqueue_trial(known)

    def _kept(self) -> list[dict[str, Any]]:
        """What was chosen, as it is stored, of trials that came to an end or wait for their turn."""
        kept = [trial for trial in self.study.trials if trial.state.name in ("COMPLETE", "PRUNED", "WAITING")]
        return [{**trial.system_attrs.get("fixed_params", {}), **trial.params} for trial in kept]

    def _has(self, name: str, value) -> bool:
        what = self.space.get(name, [])
        return what[0] <= value <= what[1] if isinstance(what, tuple) else value in what

    @property
    def seconds(self) -> float:
        return sum(trial.user_attrs.get("seconds", 0.0) for trial in self.study.trials)

    def done(self) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """(what was chosen, what was measured) of every whole trial, the best first."""
        complete = [trial for trial in self.study.trials if trial.state.name == "COMPLETE"]
        complete.sort(key=lambda trial: (-trial.value, trial.number))
        return [(self._chosen(trial.params), trial.user_attrs["measured"]) for trial in complete]

    def lines(self) -> list[dict]:
        """Every trial as JSON can hold it, in order."""
        return [
            {
                "stage": self.study.study_name, "trial": trial.number, "state": trial.state.name.lower(),
                "chosen": self._chosen(trial.params), "score": trial.value, **trial.user_attrs,
            }
            for trial in self.study.trials if trial.state.is_finished() and "seconds" in trial.user_attrs
        ]  # fmt: skip

    def run(
        self,
        measure: Callable[[Sequence[tuple[dict, Watch]]], Iterable[Tried]],
        deadline: float,
        most: int | None,
        at_a_time: int = 1,
    ) -> None:
        """Trials until `deadline` (of time.monotonic) or `most` of them, at least one whole one; so many are chosen `at_a_time`, by
        all that were made before. measure(what was chosen, the watch of each): what comes of each, in order, wherever made."""
        made = 0
        while (time.monotonic() < deadline and (most is None or made < most)) or not self.done():
            together = at_a_time if most is None else max(min(at_a_time, most - made), 1)
            made += together
            asked, started = [self._ask() for _ in range(together)], time.monotonic()
            told = 0
            try:
                for found in measure([(chosen, watch) for _, chosen, watch in asked]):
                    self._tell(asked[told][0], found)
                    told, started = told + 1, time.monotonic()
            finally:
                for trial, _, watch in asked[told:]:
                    if watch.reports or trial is asked[told][0]:
                        trial.set_user_attr("seconds", round(time.monotonic() - started, 2))
                    self._report(trial, watch.reports)
                    self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)

    def _ask(self) -> tuple[Any, dict[str, Any], Watch]:
        with _quiet(self.optuna):
            trial = self.study.ask()
            chosen = self._chosen({name: self._suggest(trial, name, what) for name, what in self.space.items()})
        whole = [each.intermediate_values for each in self.study.trials if each.state.name == "COMPLETE"]
        return trial, chosen, Watch(whole if self.prune else None)

    def _tell(self, trial, made: Tried) -> None:
        trial.set_user_attr("seconds", made.seconds)
        self._report(trial, made.reports)
        if made.found is None:
            self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
        else:
            trial.set_user_attr("measured", made.found)
            self.study.tell(trial, made.found["score"])

    def _report(self, trial, reports: Sequence[tuple[float, int]]) -> None:
        for score, step in reports:
            trial.report(score, step)

    def points(self) -> list[tuple[dict[str, Any], float, bool]]:
        """(what was chosen, the score it came to, whether it came to its end) of every trial that has a score."""
        return [(self._chosen(trial.params), score, trial.state.name == "COMPLETE") for trial, score in self._scored()]

    def importances(self) -> dict[str, float]:
        """How much each setting matters among the trials, by the scores they came to (PED-ANOVA), the most first; {} when there are
        too few of them."""
        scored = self._scored()
        if len(scored) < 2 * STARTUP:
            return {}
        with _quiet(self.optuna):
            again, found = self.optuna.create_study(direction="maximize"), self.optuna.importance
            again.add_trials(
                self.optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=score)
                for trial, score in scored
            )
            try:
                return dict(found.get_param_importances(again, evaluator=found.PedAnovaImportanceEvaluator()))
            except (ValueError, RuntimeError):  # one value of everything
                return {}

    def _scored(self) -> list[tuple[Any, float]]:
        found = [
            (trial, trial.value if trial.value is not None else trial.intermediate_values.get(trial.last_step))
            for trial in self.study.trials
        ]
        return [(trial, score) for trial, score in found if score is not None and trial.state.is_finished()]

    def _suggest(self, trial, name: str, what):
        if isinstance(what, tuple):
            return trial.suggest_float(name, *what, log=True)
        return trial.suggest_categorical(name, [self._stored(name, value) for value in what])

    def _stored(self, name: str, value):
        """As the database holds it: numbers of a range as they are, values of a list as JSON."""
        return value if isinstance(self.space[name], tuple) else json.dumps(value, sort_keys=True)

    def _chosen(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a trial; numbers with three digits, which is what a file then holds."""
        return {
            name: float(f"{value:.3g}") if isinstance(self.space[name], tuple) else json.loads(value)
            for name, value in params.items()
        }


@contextmanager
def _quiet(optuna) -> Iterator[None]:
    """No messages on stderr, where the progress bar is."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
