"""Multiple-choice tasks by lm-eval, where it is installed: both models on the same questions.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from torch import nn

from ptq.errors import CalibrationError, UnsupportedError
from ptq.evaluation.result import as_table, as_text

_METRIC = "acc"

Answers = dict[str, dict[int, bool]]
"""By task, whether each question, by its number, was answered correctly."""


@dataclass(frozen=True)
class TaskComparison:
    """One task, answered by both models.

    Args:
        items: questions.
        float_accuracy, accuracy: share that the float and the quantized model answer correctly.
        difference: quantized less float, with its 95% interval (``difference_low``,
            ``difference_high``): paired, after Agresti & Min 2005, "Simple improved confidence
            intervals for comparing matched proportions", which holds for few questions too.
        only_float, only_quantized: questions that one of the models alone answers correctly.
        mcnemar_p: of McNemar's exact test: how likely such a split of these is by chance.
    """

    items: int
    float_accuracy: float
    accuracy: float
    difference: float
    difference_low: float
    difference_high: float
    only_float: int
    only_quantized: int
    mcnemar_p: float

    def __str__(self) -> str:
        return (
            f"{100 * self.float_accuracy:.1f}% -> {100 * self.accuracy:.1f}% of {self.items}, "
            f"{100 * self.difference:+.1f} points [{100 * self.difference_low:+.1f}, "
            f"{100 * self.difference_high:+.1f}], McNemar p = {self.mcnemar_p:.2f}"
        )


@dataclass(frozen=True)
class TaskResults:
    """All tasks, by name: compared, or (without a float model) the accuracy alone."""

    tasks: dict[str, TaskComparison] | dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            name: found if isinstance(found, float) else asdict(found)
            for name, found in self.tasks.items()
        }

    def _rows(self) -> list[tuple[str, str]]:
        return [
            (name, f"{100 * found:.1f}%" if isinstance(found, float) else str(found))
            for name, found in self.tasks.items()
        ]

    def __str__(self) -> str:
        return as_text(self._rows())

    def _repr_html_(self) -> str:
        return as_table(self._rows())


def require_lm_eval() -> Any:
    """The package lm-eval.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import lm_eval
    except ModuleNotFoundError:
        raise UnsupportedError(
            "tasks are run by lm-eval, which is not installed; pip install 'ptq-toolkit[tasks]'"
        ) from None
    return lm_eval


def answers(
    model: nn.Module,
    tokenizer: Any,
    sources: Sequence[str | os.PathLike[str]],
    items: int | None = None,
    batch_size: int = 8,
) -> Answers:
    """Run multiple-choice tasks.

    Args:
        sources: directories of lm-eval task files, all of whose tasks are run (paths of data in
            them are relative to the directory); or names of tasks that lm-eval brings along, whose
            data it downloads.
        items: of each task at most.

    Raises:
        UnsupportedError: lm-eval is not installed, or a task has no accuracy.
        CalibrationError: there is no such task, or its data cannot be had.
    """
    lm_eval = require_lm_eval()
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found: Answers = {}
    for source in sources:
        with _tasks(os.fspath(source)) as (names, manager):
            try:
                result = lm_eval.simple_evaluate(
                    model=wrapped,
                    tasks=names,
                    task_manager=manager,
                    limit=items,
                    bootstrap_iters=0,
                    log_samples=True,
                )
            except (OSError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split()) or repr(error)
                raise CalibrationError(f"tasks {source}: {reason:.300}") from None
        for name, samples in result["samples"].items():
            found[name] = _answers(name, samples)
    return found


@contextlib.contextmanager
def _tasks(source: str) -> Iterator[tuple[list[str], Any]]:
    """Names of the tasks of a source and lm-eval's manager for them; within it, relative paths of
    their data are found."""
    from lm_eval.tasks import TaskManager

    folder = Path(source).expanduser()
    if not folder.is_dir():
        manager = TaskManager()
        if source not in manager.all_tasks:
            raise CalibrationError(
                f"tasks: {source!r} is neither a directory of task files nor a task of lm-eval "
                "(lm-eval ls tasks)"
            )
        yield [source], manager
        return
    manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
    names = sorted(manager.all_tasks)
    if not names:
        raise CalibrationError(f"{folder.absolute()} holds no task file of lm-eval (.yaml)")
    with contextlib.chdir(folder):
        yield names, manager


def _answers(name: str, samples: Sequence[Mapping[str, Any]]) -> dict[int, bool]:
    if any(_METRIC not in sample for sample in samples):
        raise UnsupportedError(
            f"task {name} has no metric {_METRIC!r}; only multiple-choice tasks are compared"
        )
    return {int(sample["doc_id"]): bool(sample[_METRIC]) for sample in samples}


def compare_answers(theirs: Answers, ours: Answers) -> TaskResults:
    """The float model's answers against the quantized model's.

    Raises:
        CalibrationError: they are to different questions.
    """
    if {n: set(a) for n, a in theirs.items()} != {n: set(a) for n, a in ours.items()}:
        raise CalibrationError("both models must answer the same questions of the same tasks")
    return TaskResults({name: _compare(theirs[name], ours[name]) for name in ours})


def accuracies(found: Answers) -> TaskResults:
    """Of one model."""
    return TaskResults({n: sum(a.values()) / len(a) for n, a in found.items()})


def _compare(theirs: Mapping[int, bool], ours: Mapping[int, bool]) -> TaskComparison:
    count = len(ours)
    lost = sum(theirs[item] and not ours[item] for item in ours)
    won = sum(ours[item] and not theirs[item] for item in ours)
    low, high = paired_interval(lost, won, count)
    return TaskComparison(
        items=count,
        float_accuracy=sum(theirs.values()) / count,
        accuracy=sum(ours.values()) / count,
        difference=(won - lost) / count,
        difference_low=low,
        difference_high=high,
        only_float=lost,
        only_quantized=won,
        mcnemar_p=mcnemar(lost, won),
    )


def paired_interval(
    lost: int, won: int, count: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of ``(won - lost) / count``: Wald's, with half a pair added to each of the four
    cells (Agresti & Min 2005, section 3)."""
    b, c, n = lost + 0.5, won + 0.5, count + 2
    middle = (c - b) / n
    error = math.sqrt(b + c - (c - b) ** 2 / n) / n
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p-value: ``lost`` of ``lost + won`` fair coins."""
    from scipy.stats import binomtest

    if lost + won == 0:
        return 1.0
    return float(binomtest(lost, lost + won).pvalue)
