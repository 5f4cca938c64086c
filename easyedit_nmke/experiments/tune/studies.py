"""Optuna's part: what is tried next, kept in a database that a later run goes on with."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...messages import how_to_install

Space = Mapping[str, "list | tuple[float, float]"]
Tick = Callable[[str], None]

STARTUP = 6  # trials before the sampler learns from them


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
        self.optuna, self.space = optuna, space
        file.parent.mkdir(parents=True, exist_ok=True)
        with _quiet(optuna):
            self.study = optuna.create_study(
                study_name=name, storage=f"sqlite:///{file.resolve()}", load_if_exists=True, direction="maximize",
                pruner=optuna.pruners.MedianPruner(n_startup_trials=1) if prune else optuna.pruners.NopPruner(),
            )  # fmt: skip
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed + len(self.study.trials), multivariate=True, n_startup_trials=STARTUP
            )
            for start in starts if not self.study.trials else ():
                known = {name: value for name, value in start.items() if self._has(name, value)}
                self.study.enqueue_trial({name: self._stored(name, value) for name, value in known.items()})

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

    def run(self, measure: Callable[[dict, Callable[[float, int], bool]], dict | None], deadline: float, most: int | None) -> None:
        """Trials until `deadline` (of time.monotonic) or `most` of them, at least one whole one. measure(chosen, go_on) gives what
        was measured, with "score"; None when go_on(score so far, step) said no."""
        made = 0
        while (time.monotonic() < deadline and (most is None or made < most)) or not self.done():
            made += 1
            with _quiet(self.optuna):
                trial = self.study.ask()
                chosen = self._chosen({name: self._suggest(trial, name, what) for name, what in self.space.items()})
            started, whole = time.monotonic(), False
            try:
                found = measure(chosen, lambda score, step, trial=trial: self._go_on(trial, score, step))
                whole = True
            finally:
                trial.set_user_attr("seconds", round(time.monotonic() - started, 2))
                if not whole:
                    self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
            if found is None:
                self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
            else:
                trial.set_user_attr("measured", found)
                self.study.tell(trial, found["score"])

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

    def _go_on(self, trial, score: float, step: int) -> bool:
        trial.report(score, step)
        return not trial.should_prune()

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
