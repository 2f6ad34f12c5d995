"""What the layers of a model are called in the configs of other toolkits."""

from torch import nn

from ptq.model import Experts, FileNames, is_fused_experts
from ptq.modules import QuantLinear


def float_linears(model: nn.Module) -> list[str]:
    """The names of the linear layers that stay float."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def kept_float(model: nn.Module) -> list[str]:
    """All names, in the model and in files, of linear layers that stay float.

    The routers of mixtures are among them, which are linear layers in vLLM.
    """
    names = FileNames(model)
    kept = [n for name in float_linears(model) for n in all_names(names, name)]
    for name, module in model.named_modules():
        if any(isinstance(m, Experts) or is_fused_experts(m) for m in module.children()):
            routers = (f"{name}.{leaf}" for leaf, m in module.named_children() if _is_matrix(m))
            kept += [n for router in routers for n in all_names(names, router)]
    return list(dict.fromkeys(kept))


def all_names(names: FileNames, layer: str) -> list[str]:
    """What a layer, or each of its parts, may be called in another toolkit's config."""
    parts = names.parts(layer)
    own = [layer] if len(parts) == 1 else []
    return list(dict.fromkeys([*own, *parts, *names.usual_parts(layer)]))


def _is_matrix(module: nn.Module) -> bool:
    """Whether it multiplies with a weight of its own, and is no linear layer."""
    weight = getattr(module, "weight", None)
    own = isinstance(weight, nn.Parameter) and weight.dim() == 2
    return own and not isinstance(module, nn.Linear | nn.Embedding | QuantLinear)
