"""Hadamard matrices: entries 1 and -1, orthogonal rows.

Built from Sylvester's doubling (1867) and Paley's two constructions over the integers modulo a
prime q (1933, "On Orthogonal Matrices"): order q + 1 for q = 3 modulo 4, and order 2 (q + 1) for
q = 1 modulo 4. That reaches 12, 20, 28, 36, 44, 60, 68, 76, 84, ... and their doubles; it does not
reach 52, 92 and 100, for which other constructions are known.
"""

import torch
from torch import Tensor

from ptq.errors import UnsupportedError


def hadamard(n: int) -> Tensor:
    """H float32 [n, n] with ``H H^T = n I``.

    Raises:
        UnsupportedError: there is no construction for this order; the message has the nearest.
    """
    core = _core(n)
    if core is None:
        near = [m for m in range(max(1, n // 2), 2 * n + 1) if _core(m) is not None]
        near = sorted(sorted(near, key=lambda m: abs(m - n))[:4])
        raise UnsupportedError(
            f"no Hadamard matrix of order {n} is known here; orders near it: "
            f"{', '.join(map(str, near)) or '1, 2, 4'}"
        )
    matrix = _build(core)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def orders_dividing(n: int) -> list[int]:
    """The orders up to n, ascending, that divide n and that there is a matrix for."""
    return [m for m in range(1, n + 1) if n % m == 0 and _core(m) is not None]


def _core(n: int) -> int | None:
    """The order that is built and then doubled until it is n; None where there is none."""
    while n >= 1:
        if n in (1, 2) or (n % 4 == 0 and (_is_prime(n - 1) or _paley_two(n))):
            return n
        if n % 2:
            return None
        n //= 2
    return None


def _build(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if _is_prime(order - 1):  # q + 1 is a multiple of 4
        return torch.eye(order) + _bordered(order - 1, -1.0)
    symmetric = _bordered(order // 2 - 1, 1.0)
    ones, signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(symmetric, ones) + torch.kron(torch.eye(order // 2), signs)


def _bordered(q: int, column: float) -> Tensor:
    """[q + 1, q + 1]: the quadratic characters of j - i modulo q, below a row of ones and beside a
    column of ``column``, zero on the diagonal."""
    character = torch.full((q,), -1.0)
    character[torch.arange(q).square() % q] = 1.0
    character[0] = 0.0
    places = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1)
    matrix[1:, 0] = column
    matrix[0, 0] = 0.0
    matrix[1:, 1:] = character[(places[None, :] - places[:, None]) % q]
    return matrix


def _paley_two(n: int) -> bool:
    q = n // 2 - 1
    return n % 4 == 0 and q % 4 == 1 and _is_prime(q)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
