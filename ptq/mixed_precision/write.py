"""The searched configuration as YAML: ordinary keys, and comments that say why."""

from collections.abc import Mapping
from typing import Any

import yaml

from ptq.config import Plugin, QuantizationConfig, Scheme, preset
from ptq.mixed_precision.rules import WrittenRule


def to_yaml(
    config: QuantizationConfig,
    header: list[str],
    own: list[WrittenRule],
    why: Mapping[str, str],
) -> str:
    """The text of a YAML file that :func:`ptq.load_config` reads back as this configuration.

    Args:
        header: lines of comment above everything.
        own: the searched rules, which come first among the configuration's rules.
        why: by pattern, the comment of a rule.
    """
    lines = [f"# {line}" for line in header]
    asked = config.model_dump(mode="json", exclude_defaults=True)
    rules = config.rules
    for key in asked:
        if key == "rules":
            lines.append("rules:")
            for number, rule in enumerate(rules):
                if number < len(own):
                    lines.append(f"  # {why[own[number].pattern]}")
                value = {"layers": rule.layers, "scheme": scheme_name(rule.scheme)}
                lines.append(f"  - {_flow(value)}")
        elif key in ("scheme", "embeddings"):
            lines.append(f"{key}: {_flow(scheme_name(getattr(config, key)))}")
        elif key == "recipe":
            lines.append(f"recipe: {_flow([_step(step) for step in config.recipe])}")
        else:
            lines.append(f"{key}: {_flow(_shortened(asked[key]))}")
    return "\n".join(lines) + "\n"


def scheme_name(scheme: Scheme | None) -> Any:
    """The name of a scheme that has one, else its mapping."""
    if scheme is None:
        return "float"
    name = str(scheme)
    try:
        named = preset(name) == scheme
    except ValueError:
        named = False
    return name if named else scheme.model_dump(mode="json")


def _step(step: Plugin) -> Any:
    return {"name": step.name, "options": step.options} if step.options else step.name


def _shortened(value: Any) -> Any:
    """Lists of one are written as what they hold where the key takes that."""
    if isinstance(value, dict):
        return {
            key: v[0] if key in ("data", "prompt") and isinstance(v, list) and len(v) == 1 else v
            for key, v in value.items()
        }
    return value


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
