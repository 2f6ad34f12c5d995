"""The chosen options as a configuration, and as a file with the reasons in it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from ptq.config import QuantizationConfig, Rule, Scheme
from ptq.errors import ConfigError
from ptq.mixed_precision.choices import Choice, Option
from ptq.mixed_precision.rules import WrittenRule, base_scheme, write_rules
from ptq.model import read_layers

Chosen = Iterable[tuple[Choice, Option]]


def configure(
    model: nn.Module, config: QuantizationConfig, chosen: Chosen
) -> tuple[QuantizationConfig, list[WrittenRule]]:
    """The configuration with the chosen schemes, and the rules that it got.

    Its scheme becomes what most layers get, unless ``recipe: auto`` hangs on it. Its own rules
    come last, so that they go on to win.

    Raises:
        ConfigError: nothing would be quantized.
    """
    chosen = list(chosen)
    if not config.rules and all(option.scheme is None for _, option in chosen):
        raise ConfigError(
            "the budget is met with every layer in float, so nothing needs to be quantized"
        )
    schemes = linear_schemes(chosen)
    auto = [step.name for step in config.recipe] == ["auto"]
    base = config.scheme if auto else (base_scheme(schemes) or config.scheme)
    others = [i.name for i in read_layers(model) if i.is_linear and i.name not in schemes]
    head = next((i.name for i in read_layers(model) if i.is_head), None)
    inner = {name: scheme for name, scheme in schemes.items() if name != head}
    written = write_rules(inner, base, others)
    if schemes.get(head or "") is not None and head is not None:
        written.append(WrittenRule(head, schemes[head], (head,)))
    rules = [Rule.model_validate({"layers": w.pattern, "scheme": w.scheme}) for w in written]
    changes: dict[str, object] = {"scheme": base, "rules": [*rules, *config.rules]}
    embedded = [option.scheme for choice, option in chosen if choice.is_embedding]
    if embedded:
        changes["embeddings"] = embedded[0]
    return config.model_copy(update=changes), written


def linear_schemes(chosen: Chosen) -> dict[str, Scheme | None]:
    """The scheme of each linear layer that was chosen for by itself."""
    return {
        name: option.scheme
        for choice, option in chosen
        if not choice.is_embedding
        for name in choice.layers
    }


def reasons(
    written: Iterable[WrittenRule],
    chosen: Chosen,
    kl: Mapping[tuple[str, str], float],
    base: Scheme,
) -> dict[str, str]:
    """By pattern, why its layers differ from the rest.

    Args:
        kl: predicted divergence by first layer of a choice and option's name.
    """
    firsts: dict[str, list[str]] = defaultdict(list)
    for choice, _ in chosen:
        for name in choice.layers:
            firsts[name].append(choice.layers[0])
    found = {}
    for rule in written:
        groups = list(dict.fromkeys(first for name in rule.layers for first in firsts[name]))
        name = "float" if rule.scheme is None else str(rule.scheme)
        here = sum(kl[group, name] for group in groups)
        text = f"{len(rule.layers)} layer{'s' * (len(rule.layers) > 1)}: predicted KL {here:.2g}"
        if rule.scheme != base and all((group, str(base)) in kl for group in groups):
            text += f", as {base} {sum(kl[group, str(base)] for group in groups):.2g}"
        found[rule.pattern] = text
    return found
