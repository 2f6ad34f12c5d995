"""Quantizing a model block by block, each block's inputs coming from the quantized ones before."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq.algorithms import InputMoments, Outcome, with_static_input
from ptq.blockwise.keep import Keeper, empty
from ptq.blockwise.seen import SampledInputs, SeenInputs
from ptq.blockwise.store import Reached, Store
from ptq.blockwise.together import quantize_together, together
from ptq.calibrate import (
    BlockStream,
    NotAChain,
    Progress,
    advance,
    capture,
    inputs_of,
    inputs_of_model,
)
from ptq.config import Plugin, Scheme
from ptq.core import QuantizedWeight
from ptq.errors import CalibrationError, PTQError, UnsupportedError
from ptq.model import block_lists, eval_mode, forget_ties, read_layers, shared_modules
from ptq.modules import (
    InputRotation,
    input_rotation,
    quantized_modules,
    read_rotated,
    remove_input_rotation,
)
from ptq.recipe import Recipe
from ptq.refine import BlockJob, DistillJob, LayerState, quantized_inputs
from ptq.swap import See, place
from ptq.transforms import Prepared, find_groups


@dataclass
class Blockwise:
    """One run of a recipe over a model's blocks.

    Args:
        schemes: of the layers, by name in the model.
        observer: for static input scales.
        seed: for samples and for what refinements draw.
        fill: gives the block of a name its float weights, where they are not there from the
            start; called right before the block is first used. Its float weights are freed as
            they are quantized; a block that stays float keeps them.
        store: keeps finished blocks, and how far the run is; what it has already is not done
            again. Where it ``streams``, a finished block's tensors are on the meta device.
        see: told about each layer that this run quantizes, with the float weight that its codes
            stand for, which is the transformed one.

    ``notes`` say what each step did; ``remedies`` where a step could not do what it should, and
    what was done instead; ``restored`` are the blocks that the store had.
    """

    model: nn.Module
    schemes: Mapping[str, Scheme]
    recipe: Recipe
    observer: Plugin
    seed: int = 0
    fill: Callable[[str], None] | None = None
    store: Store | None = None
    see: See | None = None
    notes: list[str] = field(default_factory=list, init=False)
    remedies: list[str] = field(default_factory=list, init=False)
    done: set[str] = field(default_factory=set, init=False)
    waiting: dict[str, LayerState] = field(default_factory=dict, init=False)
    restored: list[str] = field(default_factory=list, init=False)
    prepared: list[Prepared] = field(default_factory=list, init=False)
    _keeper: Keeper | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.store is not None:
            self._keeper = Keeper(self.model, self.store)

    def run(self, data: Iterable[Any], progress: Progress = iter) -> None:
        """Quantize every layer, in place. Layers outside the blocks, and blocks that do not just
        follow each other, are calibrated on a run of the whole model, and noted.

        Raises:
            CalibrationError: no batch, NaN or Inf in an input, or a layer with static activations
                that no batch reaches.
            UnsupportedError: blocks that need ``fill`` do not just follow each other, or the model
                does not allow a preparation of the recipe; then nothing was quantized.
        """
        batches = list(data)
        with eval_mode(self.model):
            self._prepare(batches)
            for names in block_lists(self.model):
                if not any(self._inside(name) for name in names):
                    self._fill(names)
                    continue
                stream = self._capture(names, batches)
                if stream is not None:
                    self._run_list(stream, batches, progress)
            rest = {name: s for name, s in self.schemes.items() if name not in self.done}
            if rest:
                self._run_rest(rest, batches)

    def _prepare(self, batches: list[Any]) -> None:
        """Change what is outside of the blocks; blocks that have their weights are changed too."""
        if self.recipe.preparations and not batches:
            raise CalibrationError("calibration got no batches; give some")
        for step, options in self.recipe.preparations:
            made = step.prepare(self.model, batches[0], options, self.fill)
            self.prepared.append(made)
            self.notes.append(str(made))
            if self.fill is None:
                for names in block_lists(self.model):
                    for name in names:
                        made.fold(name)

    def _fill(self, names: Iterable[str]) -> None:
        if self.fill is not None:
            for name in names:
                self.fill(name)
                for made in self.prepared:
                    made.fold(name)

    def _capture(self, names: list[str], batches: list[Any]) -> BlockStream | None:
        """The stream through these blocks; None, and noted, where they are no chain."""
        try:
            park = self.store.park if self.store is not None and self.store.streams else None
            run_first = self.fill is None
            with self._whole():
                return capture(self.model, names, batches, run_first=run_first, park=park)
        except NotAChain as reason:
            problem = f"{names[0]} to {names[-1]} are no chain: {reason}"
            if self.fill is not None:
                raise UnsupportedError(f"{problem}; set model.stream: false") from None
            self.remedies.append(problem)
            return None

    def _whole(self) -> AbstractContextManager[None]:
        """Within it, the whole model can run, as far as it is finished."""
        device = next((p.device for p in self.model.parameters() if not p.is_meta), None)
        if self._keeper is None or device is None:
            return nullcontext()
        return self._keeper.whole(device)

    def _inside(self, block: str) -> dict[str, Scheme]:
        """The layers of a block, by their name within it."""
        start = f"{block}."
        return {
            name.removeprefix(start): scheme
            for name, scheme in self.schemes.items()
            if name.startswith(start)
        }

    def _run_list(self, stream: BlockStream, batches: list[Any], progress: Progress) -> None:
        exact = None
        if self.recipe.needs_targets:
            exact = replace(stream, hidden=list(stream.hidden))
        finished = self._restore(stream, exact)
        for position, name in enumerate(progress(stream.names)):
            if position < finished:
                continue
            self._fill([name])
            try:
                self._pass(stream, exact, position)
            except NotAChain as reason:
                advice = "" if self.fill is None else "; set model.stream: false"
                raise UnsupportedError(f"block {name} is no chain: {reason}{advice}") from None
            self._keep(stream, exact, position)
        if exact is not None:
            self._finish(exact, batches, progress)

    def _restore(self, stream: BlockStream, exact: BlockStream | None) -> int:
        """Put back what the store has of these blocks; returns how many it has finished."""
        reached = None if self.store is None else self.store.load(stream.names)
        if self._keeper is None or reached is None:
            return 0
        device = stream.hidden[0].device
        rotated = {name for names in reached.rotated for name in names}
        for position, name in enumerate(stream.names[: reached.finished]):
            schemes = {
                key: _rotated(scheme) if f"{name}.{key}" in rotated else scheme
                for key, scheme in self._inside(name).items()
            }
            layers = self._keeper.put_back(stream.names, position, schemes, device)
            if self.recipe.finishes:
                _share_rotations(f"{name}.", layers, reached.rotated)
            self._settle(name, layers)
            self.restored.append(name)
            if self._keeper.store.streams:
                empty(self.model.get_submodule(name))
        self.notes[:], self.remedies[:] = reached.notes, reached.remedies
        for each, hidden in ((stream, reached.hidden), (exact, reached.exact)):
            if each is not None and hidden:
                each.hidden[:] = [h.to(device) for h in hidden]
        return reached.finished

    def _keep(self, stream: BlockStream, exact: BlockStream | None, position: int) -> None:
        """Give the store the block at this position, which is finished, and all progress."""
        if self._keeper is None:
            return
        start = f"{stream.names[position]}."
        waiting = {k.removeprefix(start): s for k, s in self.waiting.items() if k.startswith(start)}
        self._keeper.keep(stream.names, position, waiting)
        last = position + 1 == len(stream.names)
        followed = exact is not None and (bool(self.recipe.finishes) or not last)
        reached = Reached(
            position + 1,
            [] if last else stream.hidden,
            exact.hidden if exact is not None and followed else [],
            self.notes,
            self.remedies,
            self._rotated_layers(),
        )
        self._keeper.store.keep_progress(stream.names, reached)

    def _rotated_layers(self) -> list[list[str]]:
        """Names of the layers so far whose input is rotated; of those that wait, which share it."""
        placed = quantized_modules(self.model).items()
        found = [[name] for name, layer in placed if layer.scheme.input_rotation is not None]
        shared: dict[InputRotation, list[str]] = {}
        for name, state in self.waiting.items():
            hook = input_rotation(state.linear)
            if hook is not None:
                shared.setdefault(hook, []).append(name)
        return [*found, *shared.values()]

    def _pass(self, stream: BlockStream, exact: BlockStream | None, position: int) -> None:
        """Carry the hidden states through one block, and quantize its layers if it has any."""
        name = stream.names[position]
        schemes = self._inside(name)
        if schemes:
            self._run_block(stream, exact, position, schemes)
            return
        block = self.model.get_submodule(name)
        for each in (stream, exact):
            if each is not None:
                advance(each, position, block)

    def _finish(self, exact: BlockStream, batches: list[Any], progress: Progress) -> None:
        """Tune the layers of all blocks together, then put them in place."""
        for step, options in self.recipe.finishes:
            job = DistillJob(self.model, self.waiting, batches, exact, self.seed)
            self.notes += step.finish(job, options, progress)
        self._show_codes("", self._fresh(self.waiting))
        self._place("", self.waiting)
        self.waiting.clear()

    def _run_block(
        self,
        stream: BlockStream,
        exact: BlockStream | None,
        position: int,
        schemes: dict[str, Scheme],
    ) -> None:
        name = stream.names[position]
        block = self.model.get_submodule(name)
        linears = _linears(block, schemes)
        self._transform(stream, position, block, schemes)
        turned = [key for key in linears if input_rotation(linears[key]) is not None]
        schemes |= {key: _rotated(schemes[key]) for key in turned}
        seen = self._new_seen(schemes)
        if not seen.idle:
            self._watch(seen, stream, exact, position, linears)
        if exact is not None:
            advance(exact, position, block)
        layers = self._quantize(f"{name}.", linears, schemes, seen)
        for state in layers.values():
            state.show()
        if self.recipe.refinements:
            assert exact is not None
            job = BlockJob(block, position, layers, stream, exact.hidden, self.seed + position)
            for step, options in self.recipe.refinements:
                self.notes += [f"{name}: {note}" for note in step.refine(job, options)]
            self._show_codes(f"{name}.", layers)
        with quantized_inputs(layers):
            advance(stream, position, block)
        self._settle(name, layers)

    def _settle(self, name: str, layers: Mapping[str, LayerState]) -> None:
        """Put a finished block's layers in place; where a finish is to come, they wait for it."""
        if self.recipe.finishes:
            for state in layers.values():
                state.show()
            self.waiting |= {f"{name}.{key}": state for key, state in layers.items()}
        else:
            self._place(f"{name}.", layers)

    def _transform(
        self, stream: BlockStream, position: int, block: nn.Module, schemes: dict[str, Scheme]
    ) -> None:
        if not self.recipe.transforms:
            return
        arguments, keywords = stream.calls[0][position].with_hidden(stream.hidden[0])
        groups = find_groups(block, arguments, keywords)
        for transform, options in self.recipe.transforms:
            generator = torch.Generator().manual_seed(self.seed + position)
            sampled = SampledInputs(len(stream.hidden), generator)
            for rows in inputs_of(stream, position, block, _linears(block, schemes)):
                sampled.update(rows)
            samples, stats = sampled.finish()
            notes = transform.apply(block, groups, samples, stats, schemes, options)
            self.notes += [f"{stream.names[position]}: {note}" for note in notes]

    def _new_seen(self, schemes: Mapping[str, Scheme]) -> SeenInputs:
        algorithm = self.recipe.algorithm
        return SeenInputs.of(
            schemes, self.observer, moments=algorithm.needs_moments, cross=algorithm.needs_cross
        )

    def _watch(
        self,
        seen: SeenInputs,
        stream: BlockStream,
        exact: BlockStream | None,
        position: int,
        linears: Mapping[str, nn.Linear],
    ) -> None:
        block = self.model.get_submodule(stream.names[position])
        beside = inputs_of(exact, position, block, linears) if seen.cross and exact else None
        for rows in inputs_of(stream, position, block, linears):
            seen.update(rows, None if beside is None else next(beside))

    def _quantize(
        self,
        prefix: str,
        linears: Mapping[str, nn.Linear],
        schemes: Mapping[str, Scheme],
        seen: SeenInputs,
    ) -> dict[str, LayerState]:
        """Codes for each layer, whose float weights are kept where a refinement needs them."""
        moments = seen.finish()
        outcomes: dict[str, Outcome] = {}
        for keys in together(linears, schemes, moments, self.recipe.algorithm):
            made = self._outcomes(prefix, {key: linears[key] for key in keys}, schemes, moments)
            outcomes.update(zip(keys, made, strict=True))
        layers = {}
        for key, linear in linears.items():
            name, outcome = f"{prefix}{key}", outcomes.pop(key)
            with _named(name):
                codes = _with_input(outcome.weight, key, schemes[key], seen)
            self.remedies += [f"{name}: {note}" for note in outcome.notes]
            original = self._original(linear.weight.detach())
            layers[key] = LayerState(linear, original, schemes[key], codes)
        self._show_codes(prefix, layers)
        return layers

    def _outcomes(
        self,
        prefix: str,
        linears: Mapping[str, nn.Linear],
        schemes: Mapping[str, Scheme],
        moments: Mapping[str, InputMoments],
    ) -> list[Outcome]:
        """Of layers that are quantized as one."""
        first = next(iter(linears))
        with _named(", ".join(f"{prefix}{key}" for key in linears)):
            return quantize_together(
                list(linears.values()),
                schemes[first],
                moments.get(first),
                self.recipe.algorithm,
                self.recipe.options,
            )

    def _original(self, weight: Tensor) -> Tensor:
        """The float weight; a copy where somebody asks for it after the layer's has changed."""
        asked = self.recipe.refinements or (self.see is not None and self.recipe.finishes)
        return weight.clone() if asked else weight

    def _show_codes(self, prefix: str, layers: Mapping[str, LayerState]) -> None:
        if self.see is not None:
            for key, state in layers.items():
                self.see(f"{prefix}{key}", state.original, state.weight)

    def _fresh(self, layers: Mapping[str, LayerState]) -> dict[str, LayerState]:
        """Those of this run: what the store had comes without its float weight."""
        starts = tuple(f"{block}." for block in self.restored)
        return {k: state for k, state in layers.items() if not k.startswith(starts)}

    def _place(self, prefix: str, layers: Mapping[str, LayerState]) -> None:
        shared = shared_modules(self.model)
        for key, state in layers.items():
            name = f"{prefix}{key}"
            remove_input_rotation(state.linear)
            place(self.model, name, state.weight, state.scheme, alone=name not in shared)
            self.done.add(name)

    def _run_rest(self, schemes: dict[str, Scheme], batches: list[Any]) -> None:
        """Layers outside the blocks: what they see of a run of the whole model."""
        linears = _linears(self.model, schemes)
        tied = {info.name for info in read_layers(self.model) if info.tied_to is not None}
        if self.recipe.algorithm.needs_cross:
            self.remedies.append("outside the blocks, upstream errors are not followed")
        algorithm = self.recipe.algorithm
        seen = SeenInputs.of(schemes, self.observer, moments=algorithm.needs_moments, cross=False)
        if not seen.idle:
            with self._whole():
                for index, batch in enumerate(batches):
                    seen.update(inputs_of_model(self.model, linears, batch, index), None)
        layers = self._quantize("", linears, schemes, seen)
        self._place("", layers)
        if tied & set(schemes):
            forget_ties(self.model)
        names = ", ".join(schemes) if len(schemes) < 4 else f"{len(schemes)} layers"
        self.remedies.append(f"outside the blocks, only the algorithm was applied to: {names}")


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """An error within it says which layer it is about."""
    try:
        yield
    except PTQError as error:
        raise type(error)(f"layer {layer}: {error}") from None


def _linears(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    layers = {name: module.get_submodule(name) for name in names}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}


def _share_rotations(
    prefix: str, layers: Mapping[str, LayerState], rotated: Iterable[list[str]]
) -> None:
    """Let those of a block's layers that shared a rotation read through one again."""
    for names in rotated:
        shared = [layers[key].linear for n in names if (key := n.removeprefix(prefix)) in layers]
        if shared:
            read_rotated(shared)


def _rotated(scheme: Scheme) -> Scheme:
    return scheme.model_copy(update={"input_rotation": "hadamard"})


def _with_input(
    weight: QuantizedWeight, key: str, scheme: Scheme, seen: SeenInputs
) -> QuantizedWeight:
    """The weight with its static input scale, if the scheme has one."""
    if key not in seen.observers or scheme.activations is None:
        return weight
    try:
        low, high = seen.observers[key].range()
    except CalibrationError:
        raise CalibrationError(
            "no calibration batch reaches it, so it cannot have a static input scale; give data "
            "that reaches it, or a rule with dynamic activations or float"
        ) from None
    device: Any = weight.packed.device
    return with_static_input(weight, scheme.activations, low.to(device), high.to(device))
