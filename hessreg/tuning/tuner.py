"""The search: asks a study for values, trains with them, and tells it what came out."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessreg.gan.config import TrainConfig, with_values
from hessreg.gan.progress import say
from hessreg.gan.run import Interrupted
from hessreg.gan.run_folder import RunFolder, RunFolderError
from hessreg.gan.tasks import make_task
from hessreg.tuning.claim import claim_folder
from hessreg.tuning.config import TuneConfig
from hessreg.tuning.outcome import Outcome
from hessreg.tuning.space import DEFAULT_SPACE, SearchSpace
from hessreg.tuning.study import open_study, queued_point
from hessreg.tuning.trial_run import TrialRun

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

__all__ = ["Tuner", "TuningError"]

_POLL = 0.2  # seconds
_BEAT = 20.0  # seconds between signs of life of a trial
_LOST = 300.0  # seconds without one after which another search gives a trial up
_TAKEN = "was given up by another search, which replaces it"


class TuningError(RuntimeError):
    """No trial of a search succeeded."""


class Tuner:
    """A search for hyperparameters; `run` goes on where an earlier one in the folder stopped.

    Every trial is a training run in a process of its own, so that one that is killed costs nothing
    but a restart from its last checkpoint. Several searches, on one machine or many, may share a
    study, each in a folder of its own.

    Args:
        path: Folder for the trials and what they found.
        base: What is not varied; its seed is that of the first trial, the next has the next.
        config: Of the search.

    Raises:
        SpaceError: If the search space cannot be used.
        StudyError: If the study cannot be opened, or is another one than before or the folder's.
        ValueError: If an objective is unknown.
        RunFolderError: If another search uses the folder, or it cannot be made.
    """

    def __init__(self, path: Path, base: TrainConfig, config: TuneConfig) -> None:
        self.path, self.base, self.config = path, base, config
        self.space = SearchSpace.read(base, Path(config.space or DEFAULT_SPACE))
        self.objectives = _objectives(config.objectives, base)
        self._folder = RunFolder(path)
        with _folder_for(path):
            self._folder.lock()
            try:
                self.study = open_study(config, path, self.space, self.objectives, base.seed)
                self._owner = claim_folder(path, self.study)
            except BaseException:
                self._folder.unlock()
                raise
        self._running: dict[int, tuple[Trial, TrialRun]] = {}
        self._next_beat = 0.0

    def run(self) -> Outcome:
        """Search until the study has its number of trials.

        Raises:
            Interrupted: If Ctrl-C was pressed; trials that were running go on the next time.
            TuningError: If no trial succeeded.
        """
        try:
            self._adopt()
            self._turn()  # what it gives up is to be replaced, also where nothing else is left
            while self._running or self._is_more():
                time.sleep(_POLL)
                self._turn()
        except KeyboardInterrupt:
            again = f"continue with the same command and --out {self.path}"
            raise Interrupted(f"stopped; {again}") from None
        finally:
            for _, run in self._running.values():
                run.stop()
        if not self._trials("COMPLETE"):
            raise TuningError(f"none of the trials got to its end; see {self.path / 'trials'}")
        return Outcome(self.path, self.study, self.space, self.objectives)

    def close(self) -> None:
        """Let other searches use the folder, in which the outcome trains, too."""
        self._folder.unlock()

    def _adopt(self) -> None:
        """Go on with the trials that an earlier search in this folder left running."""
        from optuna.trial import Trial

        for frozen in self._trials("RUNNING"):
            if frozen.user_attrs.get("owner") != self._owner:
                continue
            run = self._run_of(frozen.number, max(frozen.intermediate_values, default=0))
            if not run.is_prepared:  # killed before there was anything to go on with
                self._mark_lost(frozen)
            else:
                self._running[frozen.number] = Trial(self.study, frozen._trial_id), run

    def _turn(self) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        with suppress(UpdateFinishedTrialError):  # given up just now: the next turn drops it
            self._drop()
            self._ask()
            self._collect()
            self._beat()

    def _is_more(self) -> bool:
        """Whether the study lacks trials; those that were given up do not count."""
        tried = self._trials("RUNNING", "COMPLETE", "PRUNED", "FAIL")
        counted = sum("lost" not in trial.user_attrs for trial in tried)
        queued = self.config.sampler != "grid" or bool(self._trials("WAITING"))
        return counted < self.config.trials and queued

    def _drop(self) -> None:
        """Let go of trials that another search gave up, as while this machine was asleep."""
        running = {frozen.number for frozen in self._trials("RUNNING")}
        for number in self._running.keys() - running:
            self._running.pop(number)[1].stop()
            self._say(number, _TAKEN)

    def _ask(self) -> None:
        while len(self._running) < self.config.workers and self._is_more():
            trial = self.study.ask()
            run = self._run_of(trial.number)
            trial.set_user_attr("folder", str(run.path))  # for people
            trial.set_user_attr("owner", self._owner)
            try:
                values = self.space.suggest(trial)
                seeded = replace(self.base, seed=self.base.seed + trial.number)
                run.prepare(with_values(seeded, values))
            except ValueError as error:  # values that cannot be used together
                self._give_up(trial, str(error))
            else:
                self._running[trial.number] = trial, run

    def _collect(self) -> None:
        for number, (trial, run) in list(self._running.items()):
            state = run.poll()
            # Those of a run that finished meanwhile are what others are compared with.
            pruned = self._is_hopeless(trial, run) and state == "running"
            if state == "running" and not pruned:
                continue
            del self._running[number]
            if pruned:
                run.stop()
                self._end(trial, "pruned")
            elif state == "finished":
                self._complete(trial, run.result())
            elif state == "failed":  # not finite: known to be bad, unlike a process that was killed
                self._end(trial, "pruned", run.reason())
            else:
                self._give_up(trial, run.reason() if state == "refused" else "killed repeatedly")

    def _is_hopeless(self, trial: Trial, run: TrialRun) -> bool:
        if len(self.objectives) > 1:
            return False
        for step, value in run.evaluations(self.objectives[0]):
            trial.report(value, step)
        return trial.should_prune()

    def _complete(self, trial: Trial, result: dict[str, Any]) -> None:
        missing = [name for name in self.objectives if name not in result]
        values = [result.get(name, math.nan) for name in self.objectives]
        if missing or not all(map(math.isfinite, values)):
            self._give_up(trial, f"no finite {', '.join(missing or self.objectives)}")
            return
        self._tell(trial, "complete", ", ".join(map(_described, self.objectives, values)), values)

    def _give_up(self, trial: Trial, reason: str) -> None:
        self._end(trial, "fail", reason)

    def _end(self, trial: Trial, state: str, reason: str = "") -> None:
        if reason:
            trial.set_user_attr("reason", reason)
        self._tell(trial, state, f"{state}: {reason}" if reason else state)

    def _tell(
        self, trial: Trial, state: str, what: str, values: Sequence[float] | None = None
    ) -> None:
        from optuna.trial import TrialState

        wanted = TrialState[state.upper()]
        told = self.study.tell(trial, values, wanted, skip_if_finished=True)
        self._say(trial.number, what if told.state == wanted else _TAKEN)

    def _beat(self) -> None:
        """Show that these trials live, and give up those of searches that do not."""
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + _BEAT
        for trial, _ in self._running.values():
            trial.set_user_attr("alive", time.time())
        for frozen in self._trials("RUNNING"):
            if frozen.number not in self._running and _age(frozen) > _LOST:
                self._mark_lost(frozen)

    def _mark_lost(self, frozen: FrozenTrial) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import Trial, TrialState

        # Another search was first: of its telling, Optuna says ValueError if it knew before.
        with suppress(UpdateFinishedTrialError, ValueError):
            Trial(self.study, frozen._trial_id).set_user_attr("lost", True)
            self.study.tell(frozen.number, state=TrialState.FAIL)
            if self.config.sampler == "grid":
                self.study.enqueue_trial(queued_point(frozen))
            self._say(frozen.number, "given up with its search; it is replaced")

    def _trials(self, *states: str) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        wanted = [TrialState[state] for state in states]
        return self.study.get_trials(deepcopy=False, states=wanted)

    def _run_of(self, number: int, seen: int = 0) -> TrialRun:
        return TrialRun((self.path / "trials" / f"{number:04d}").resolve(), seen)

    def _say(self, number: int, what: str) -> None:
        done = len(self._trials("COMPLETE", "PRUNED", "FAIL"))
        best = ""
        if len(self.objectives) == 1 and self._trials("COMPLETE"):
            best = f"; best {self.study.best_value:.4g}, trial {self.study.best_trial.number}"
        say(f"{done} of {self.config.trials}: trial {number} {what}{best}")


@contextmanager
def _folder_for(path: Path) -> Iterator[None]:
    """Make a folder, of which nothing is left if what is inside fails, unless it is another's.

    Raises:
        RunFolderError: If it cannot be made, or another process got its lock first.
    """
    try:
        path.mkdir(parents=True)
        is_ours = True
    except OSError as error:
        if not path.is_dir():
            raise RunFolderError(f"cannot write to {path}: {error.strerror}") from None
        is_ours = False
    try:
        yield
    except RunFolderError:
        raise
    except BaseException:
        if is_ours:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _objectives(text: str, base: TrainConfig) -> Sequence[str]:
    task = make_task(base)
    judge = task.judge(task.load())
    names = [part.strip() for part in text.split(",")] if text else [judge.headline]
    known = [*judge.columns, "cpu_seconds"]
    if len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(f"objectives must be different ones of {', '.join(known)}, got {text!r}")
    return names


def _described(name: str, value: float) -> str:
    return f"{name} {value:.4g}"


def _age(frozen: FrozenTrial) -> float:
    """Seconds since the last sign of life, on the clock of whoever gave it."""
    started = frozen.datetime_start.timestamp() if frozen.datetime_start else time.time()
    return time.time() - frozen.user_attrs.get("alive", started)
