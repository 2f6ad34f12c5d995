"""The rotation of a decoder's residual stream, merged into its weights.

- ``turn``: the matrix, and weights that are multiplied by it;
- ``ports``: which layers of a block read the stream and which write to it;
- ``ends``: the embedding, the last norm and the output head;
- ``step``: the step of a recipe.
"""

from ptq.transforms.residual.step import (
    ResidualRotationOptions,
    require_stream,
    rotate_residual,
)

__all__ = ["ResidualRotationOptions", "require_stream", "rotate_residual"]
