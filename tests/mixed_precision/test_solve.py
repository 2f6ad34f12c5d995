"""The allocation against trying every one."""

import os
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.errors import ConfigError
from ptq.mixed_precision.solve import Limit, allocate

MB = (1e-6, "MB")


def total(table, chosen) -> float:
    return sum(row[i] for row, i in zip(table, chosen, strict=True))


row = st.lists(
    st.tuples(st.floats(0, 1), st.integers(1, 90), st.integers(1, 9)), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(st.lists(row, min_size=1, max_size=5), st.floats(0, 1))
def test_no_other_choice_is_better(rows, share: float) -> None:
    cost, size, time = ([[option[i] for option in r] for r in rows] for i in range(3))
    least, most = (sum(f(r) for r in size) for f in (min, max))
    bound = least + share * (most - least)
    limits = [Limit("size", size, bound, MB), Limit("time", time, 4 * len(rows), (1, "ms"))]
    every = [
        chosen
        for chosen in product(*(range(len(r)) for r in rows))
        if total(size, chosen) <= bound and total(time, chosen) <= 4 * len(rows)
    ]
    if not every:
        with pytest.raises(ConfigError, match="cannot be met"):
            allocate(cost, limits)
        return
    found = allocate(cost, limits)
    assert total(size, found) <= bound + 1e-6 and total(time, found) <= 4 * len(rows)
    best = min(total(cost, chosen) for chosen in every)
    assert total(cost, found) == pytest.approx(best, rel=1e-4, abs=1e-5)


def test_what_is_possible_is_said() -> None:
    size = [[1e6, 2e6], [3e6, 5e6]]
    with pytest.raises(
        ConfigError, match=r"'4 MB' cannot be met: the candidates give 5 MB to 8 MB, 4 MB are"
    ):
        allocate(size, [Limit("4 MB", size, 3e6, MB, fixed=1e6)])


def test_what_is_possible_together_is_said() -> None:
    size, time = [[1e6, 2e6]], [[9.0, 1.0]]
    limits = [Limit("1.5 MB", size, 1.5e6, MB), Limit("2 ms", time, 2.0, (1, "ms"))]
    with pytest.raises(ConfigError, match="'2 ms' cannot be met together with '1.5 MB': .* 9 ms"):
        allocate(size, limits)


def test_the_solver_prints_nothing(monkeypatch, capfd) -> None:
    """HiGHS does so now and then, on the process' own standard output."""
    from scipy import optimize

    own = optimize.milp

    def talking(*arguments, **options):
        os.write(1, b"a line of HiGHS")
        return own(*arguments, **options)

    monkeypatch.setattr(optimize, "milp", talking)
    assert allocate([[2.0, 1.0]], []) == [1]
    os.write(1, b"after it")
    assert capfd.readouterr().out == "after it"


def test_what_every_option_of_a_row_costs_does_not_hide_the_rest() -> None:
    """The optimum's gap is of what can be chosen: a million more or less a row changes nothing."""
    cost = [[0.3, 0.2, 0.1], [0.9, 0.35, 0.05], [0.4, 0.3, 0.25]]
    size = [[1.0, 2.0, 3.0]] * 3
    limits = [Limit("size", size, 6.0, MB)]
    found = allocate(cost, limits)
    assert total(cost, found) == pytest.approx(0.3 + 0.05 + 0.3)
    for shift in (-1e6, 1e6):
        moved = [[value + shift for value in row] for row in cost]
        assert allocate(moved, limits) == found
