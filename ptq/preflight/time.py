"""How long a run takes: its work, counted, times what each piece takes on this machine."""

from ptq.preflight.facts import Facts, LinearFacts
from ptq.preflight.rates import Rates

_LIBRARIES = 0.5  # seconds: what is imported later than the plan
_PARSES = 1.3, 3.3  # of a GGUF file's header: for its tokenizer, for its weights
_DEQUANTIZING = 25e-9  # of an element of a GGUF file, by the package gguf
_START = 4.5e6  # operations that importing everything in a new process is worth
_SMALL_OPERATIONS = 800  # of a block, its layers' calls included
_COLD = 1.2  # how much slower rounding is on memory that was not used just before
_GIVEN_BACK = 1.3  # how much slower a calibrated pass is, whose memory goes back to the system
_HIDDEN_PASSES, _INNER_PASSES = 40, 8  # over a token's states: norms, rotation, sums, gates

Terms = dict[str, float]


def time_terms(facts: Facts, rates: Rates) -> Terms:
    """Seconds, by what they are spent on, in the order of the run."""
    work = _Work(facts, rates)
    return {name: value for name, value in work.terms().items() if value > 0}


class _Work:
    """The counts of one run.

    Args:
        rates: measured with this run's shapes.
    """

    def __init__(self, facts: Facts, rates: Rates) -> None:
        self.facts, self.rates = facts, rates
        self.other = self._other()
        self.float_token = self._blocks(False)
        self.quantized_token = self._blocks(True)
        self.block_token = self._blocks(False, rates.fast)

    def terms(self) -> Terms:
        evaluation, generation = self.facts.config.evaluation, self.facts.config.generation
        windows = 0 if evaluation is None else evaluation.windows * evaluation.context
        prompts = () if generation is None else generation.prompt
        new = 0 if generation is None else generation.max_new_tokens * len(prompts)
        return {
            "libraries, tokenizer": _LIBRARIES + _PARSES[0] * self.facts.source.parse_seconds,
            "load": self._load(),
            "evaluate float": windows * (self.float_token + self._head(False) + self._keep()),
            "generate float": new * self._one(False),
            "calibrate": self._calibrate(),
            "quantize": self._quantize(),
            "calibrate the cache": self._calibrate_cache(),
            "save": 4 * self.facts.quantized_bytes * self.rates.hashing,
            "verify": self._verify(),
            "read back": 2 * self.facts.quantized_bytes * self.rates.hashing,
            "evaluate quantized": windows
            * (self.quantized_token + self._head(True) + self.rates.statistics + self._keep(14)),
            "generate quantized": new * self._one(True),
        }

    def _other(self) -> float:
        """Of a token in all blocks: attention, and the passes over its states."""
        f, r = self.facts, self.rates
        passes = _HIDDEN_PASSES * f.hidden + _INNER_PASSES * f.inner
        return f.blocks * (r.attention / r.tokens + passes * r.element)

    def _blocks(self, quantized: bool, share: float = 1.0) -> float:
        """Of a token in all blocks, whose products take this share of their time."""
        layers = (x for x in self.facts.linears if x.inside)
        products = sum(self._layer(x, quantized, 0) for x in layers) / self.rates.tokens
        calls = self.facts.blocks * _SMALL_OPERATIONS * self.rates.small / self.rates.tokens
        return self.other + share * products + calls

    def _layer(self, layer: LinearFacts, quantized: bool, which: int) -> float:
        key = layer.shape, str(layer.scheme)
        made = self.rates.quantized if quantized and layer.scheme is not None else None
        once = self.rates.linear[layer.shape] if made is None else made[key]
        return once[which] * layer.count * layer.share

    def _head(self, quantized: bool) -> float:
        if not self.facts.vocabulary:
            return 0.0
        return self._head_of(quantized, 0) / self.rates.tokens

    def _head_of(self, quantized: bool, which: int) -> float:
        head = (self.facts.vocabulary, self.facts.hidden)
        known = self.rates.quantized if quantized else {}
        found = next((v for (shape, _), v in known.items() if shape == head), None)
        return (found or self.rates.linear[head])[which]

    def _keep(self, passes: int = 8) -> float:
        """Of a token: its logits are checked, and written; or checked, and the float ones read."""
        return passes * self.facts.vocabulary * self.rates.element

    def _one(self, quantized: bool) -> float:
        """A token that is generated alone: every weight is read from memory."""
        inside = (x for x in self.facts.linears if x.inside)
        layers = sum(self._layer(x, quantized, 1) for x in inside)
        head = self._head_of(quantized, 1) if self.facts.vocabulary else 0.0
        held = self.facts.quantized_bytes if quantized else self.facts.float_bytes
        products = max(layers + head, held * self.rates.streaming)
        return products + self.facts.blocks * _SMALL_OPERATIONS * self.rates.small

    def _load(self) -> float:
        source, parameters = self.facts.source, self.facts.plan.parameters
        finite = parameters * self.rates.checking
        if source.gguf:
            return _PARSES[1] * source.parse_seconds + parameters * _DEQUANTIZING + finite
        if self.facts.streamed:
            return 2 * finite * self.facts.outside_bytes / max(1, self.facts.float_bytes)
        return 2 * finite

    def _calibrate(self) -> float:
        """The whole model runs, and its layers' inputs are counted."""
        f = self.facts
        if not f.recipe.plain or f.static is None:
            return 0.0
        seen = sum(x.shape[1] * x.count for x in f.quantized_linears) * self.rates.observing
        tokens = sum(batch * length for batch, length in f.padded_batches)
        return _GIVEN_BACK * tokens * (self.float_token + self._head(False) + seen)

    def _calibrate_cache(self) -> float:
        """The quantized model runs, and its keys and values are counted."""
        f = self.facts
        if not f.static_cache:
            return 0.0
        seen = 2 * f.blocks * f.kv_heads * f.head_dim * self.rates.observing
        tokens = sum(batch * length for batch, length in f.padded_batches)
        return tokens * (self.quantized_token + seen)

    def _quantize(self) -> float:
        rounding = sum(
            x.elements * self.rates.rounding[str(x.scheme)] for x in self.facts.quantized_linears
        )
        rounding *= _COLD
        if self.facts.streamed:
            rounding += self._streaming()
        return rounding if self.facts.recipe.plain else rounding + self._blockwise()

    def _streaming(self) -> float:
        """Blocks are read and checked; finished ones are hashed and written."""
        f, r = self.facts, self.rates
        read = f.block_elements * f.blocks * (r.checking + f.float_dtype.itemsize * r.streaming)
        return 1.5 * read + 4 * f.quantized_bytes * r.hashing

    def _blockwise(self) -> float:
        """Hidden states pass through each block; what the steps of the recipe do there."""
        f = self.facts
        watched = bool(f.recipe.algorithm.needs_moments or f.static)
        passes = 1 + watched + f.recipe.needs_targets * (1 + f.recipe.algorithm.needs_cross)
        total = passes * f.calibration_tokens * self.block_token
        if watched:
            total += self._moments()
        for name, (_, options) in zip(f.recipe.steps_of_blocks, f.recipe.refinements, strict=True):
            if name == "learned_rounding":
                total += self._learned_rounding(options.iterations, options.sequences)
        total += 2 * len(f.recipe.transforms) * f.calibration_tokens * self.block_token
        if f.recipe.finishes:
            total += 4 * f.calibration_tokens * (self.block_token + self._head(False))
        return total

    def _learned_rounding(self, iterations: int, sequences: int) -> float:
        samples = len(self.facts.calibration_lengths)
        once = self.facts.calibration_tokens / samples * self.block_token
        checks = 1 + sum(1 for i in range(iterations) if _checked(i, iterations))
        check = min(samples, max(8, sequences))
        elements = self.facts.block_elements * self.facts.blocks
        steps = iterations * (
            3 * min(sequences, samples) * once + 22 * elements * self.rates.element
        )
        return 1.15 * (steps + checks * check * once)

    def _moments(self) -> float:
        """Sums of the inputs' products, and the columns that are rounded one by one."""
        f, total = self.facts, 0.0
        if not f.recipe.algorithm.needs_moments:
            return 0.0
        for layer in f.quantized_linears:
            n, k = layer.shape
            flop = self.rates.fast * self.rates.linear[layer.shape][0] / (self.rates.tokens * n * k)
            products = f.calibration_tokens * k * k / 2 + 3 * k**3 + 6 * n * k * k
            total += layer.count * 1.35 * (products * flop + 8 * k * 10 * self.rates.small)
        return total

    def _verify(self) -> float:
        """A process starts, hashes the files and loads them; there and here the model runs on a
        few tokens, one after the other, and every layer's output is hashed."""
        read = 2 * self.facts.quantized_bytes * self.rates.hashing
        output = self.facts.config.output
        if output is not None and output.verify == "files":
            return read
        runs = 0 if self.facts.streamed else 4
        return _START * self.rates.small + read + runs * self._one(True)


def _checked(iteration: int, iterations: int) -> bool:
    every = max(1, iterations // 10)
    return (iteration + 1) % every == 0 and iteration + 1 >= iterations // 2
