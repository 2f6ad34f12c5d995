"""Finding a model's repeated blocks in its module tree."""

from torch import nn

from ptq.model.unfold import is_foldable


def block_lists(model: nn.Module) -> list[list[str]]:
    """Names of the blocks of each outermost ``nn.ModuleList`` whose members hold linear layers.

    A decoder has one such list, an encoder-decoder two. Lists inside a block (experts) are part
    of the block. Lists of different kinds of modules (a list of heads, say) count as well: whether
    their members really feed each other is for the capture to find out.
    """
    found: list[list[str]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(p) for p in inside):
            continue
        if all(_has_linear(child) for child in module) and len(module) > 0:
            found.append([f"{name}.{index}" for index in range(len(module))])
            inside.append(f"{name}.")
    return found


def _has_linear(module: nn.Module) -> bool:
    # A bare linear layer is a layer, not a block.
    return not _is_linear(module) and any(_is_linear(child) for child in module.modules())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_foldable(module)
