"""The recipe: preparations, transforms, one algorithm, refinements, a finish; their options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ptq.algorithms import ALGORITHMS, Algorithm, NoOptions
from ptq.config import Plugin, Scheme
from ptq.errors import ConfigError
from ptq.formats import FloatFormat
from ptq.plugins import check_options, nearest
from ptq.refine import FINISHES, REFINEMENTS, Finish, Refinement
from ptq.transforms import PREPARATIONS, TRANSFORMS, Preparation, Transform

Step = TypeVar("Step", Preparation, Transform, Refinement, Finish)

_ORDER = ("preparation", "transform", "algorithm", "refinement", "finish")


@dataclass(frozen=True)
class Recipe:
    """The steps that every block goes through, each with its options."""

    preparations: tuple[tuple[Preparation, Any], ...]
    transforms: tuple[tuple[Transform, Any], ...]
    algorithm: Algorithm
    options: Any
    refinements: tuple[tuple[Refinement, Any], ...]
    finishes: tuple[tuple[Finish, Any], ...]
    names: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """Nothing but weights is needed: no calibration data, no blocks."""
        steps = (*self.preparations, *self.transforms, *self.refinements, *self.finishes)
        return not (steps or self.algorithm.needs_moments)

    @property
    def unties(self) -> bool:
        """Whether an output head that is tied to the embedding needs a weight of its own."""
        return any(step.unties for step, _ in self.preparations)

    @property
    def steps_of_blocks(self) -> tuple[str, ...]:
        """The names of the refinements."""
        first = len(self.preparations) + len(self.transforms) + 1  # behind the algorithm
        return self.names[first : first + len(self.refinements)]

    @property
    def needs_targets(self) -> bool:
        """Whether the float model's hidden states are followed beside the quantized ones."""
        return bool(self.refinements or self.finishes) or self.algorithm.needs_cross

    def decided(self, scheme: Scheme) -> Scheme:
        """The scheme of a linear layer, with what the algorithm decides whatever the data."""
        ordered = self.algorithm.orders_inputs(scheme.weights, self.options)
        return scheme.model_copy(update={"input_order": True}) if ordered else scheme

    def __str__(self) -> str:
        return ", ".join(self.names)


def auto_steps(scheme: Scheme) -> list[Plugin]:
    """The steps that measured best for schemes of this kind: docs/accuracy.md has the figures."""
    fmt = scheme.weights.number_format
    if isinstance(fmt, FloatFormat):
        return _plugins("rtn")
    if fmt.bits == 8:
        return _plugins("rtn") if scheme.activations is None else _plugins("rotation", "gptq")
    return _plugins("gptaq", "learned_rounding", "distill")


def _plugins(*names: str) -> list[Plugin]:
    return [Plugin(name=name) for name in names]


def make_recipe(steps: Sequence[Plugin], scheme: Scheme) -> Recipe:
    """Check a recipe: known names, known options, preparations of the model and transforms of
    blocks before the one algorithm (round to nearest if none is named), refinements of blocks after
    it, then finishes of the whole model.

    Args:
        scheme: that most layers get; ``auto``, alone, is what measured best for it.

    Raises:
        ConfigError: it is not one of these; the step is named.
    """
    if [step.name for step in steps] == ["auto"]:
        check_options("recipe step", steps[0], NoOptions)
        steps = auto_steps(scheme)
    known = {
        **dict.fromkeys(PREPARATIONS, "preparation"),
        **dict.fromkeys(TRANSFORMS, "transform"),
        **dict.fromkeys(ALGORITHMS, "algorithm"),
        **dict.fromkeys(REFINEMENTS, "refinement"),
        **dict.fromkeys(FINISHES, "finish"),
    }
    last = 0
    chosen: dict[str, list[Plugin]] = {kind: [] for kind in _ORDER}
    for number, step in enumerate(steps):
        if step.name not in known:
            hint = nearest(step.name, [*known, "auto"], "known steps")
            raise ConfigError(f"recipe.{number}: unknown step {step.name!r}; {hint}")
        place = _ORDER.index(known[step.name])
        if place < last:
            raise ConfigError(
                f"recipe.{number}: {step.name} is a step of the kind '{_ORDER[place]}', which "
                f"comes before {steps[number - 1].name}; the order is: preparations "
                f"({', '.join(PREPARATIONS)}), transforms "
                f"({', '.join(TRANSFORMS)}), one algorithm ({', '.join(ALGORITHMS)}), "
                f"refinements ({', '.join(REFINEMENTS)}), finishes ({', '.join(FINISHES)})"
            )
        last = place
        chosen[_ORDER[place]].append(step)
    transforms = [step.name for step in chosen["transform"]]
    if "rotation" in transforms[:-1]:
        raise ConfigError(
            f"recipe: rotation comes before {transforms[transforms.index('rotation') + 1]}; put it "
            "last of the transforms: what it rotates can no longer be scaled"
        )
    if len(chosen["algorithm"]) > 1:
        names = " and ".join(step.name for step in chosen["algorithm"])
        raise ConfigError(f"recipe: {names} are both algorithms; a recipe has one")
    step = (chosen["algorithm"] or [Plugin(name="rtn")])[0]
    if step.name == "hqq" and isinstance(scheme.weights.number_format, FloatFormat):
        raise ConfigError(
            f"recipe: hqq is for integer codes, not for scheme {scheme}: leave it out"
        )
    algorithm = ALGORITHMS[step.name]
    return Recipe(
        _checked(PREPARATIONS, chosen["preparation"]),
        _checked(TRANSFORMS, chosen["transform"]),
        algorithm,
        check_options("recipe step", step, algorithm.options),
        _checked(REFINEMENTS, chosen["refinement"]),
        _checked(FINISHES, chosen["finish"]),
        tuple(
            s.name
            for s in (
                *chosen["preparation"],
                *chosen["transform"],
                step,
                *chosen["refinement"],
                *chosen["finish"],
            )
        ),
    )


def _checked(known: Mapping[str, Step], steps: Sequence[Plugin]) -> tuple[tuple[Step, Any], ...]:
    """Steps of one kind, each with its options."""
    made = ((known[step.name], step) for step in steps)
    return tuple((found, check_options("recipe step", s, found.options)) for found, s in made)
