"""When values count as a grid."""

import torch

from quantpass.patterns import folded

FLOAT32 = (torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny)
BFLOAT16 = (torch.finfo(torch.bfloat16).eps, torch.finfo(torch.bfloat16).tiny)


def steps(first, last, step=0.3, dtype=torch.float32):
    return (torch.arange(first, last).double() * step).to(dtype).double()


def on_a_grid(values, eps, tiny):
    """Whether one column lies on a grid."""
    grids = folded._fitted_grids(values[None])
    return grids is not None and grids.columns_on(eps, tiny) == {0}


def test_a_grid_has_8_values_and_256_steps():
    assert on_a_grid(steps(0, 9), *FLOAT32)
    assert not on_a_grid(steps(0, 8), *FLOAT32), "zero counts for nothing"
    assert on_a_grid(steps(1, 257), *FLOAT32)
    assert not on_a_grid(torch.cat([steps(1, 10), steps(300, 301)]), *FLOAT32)


def test_the_smallest_value_may_be_several_steps_away():
    assert on_a_grid(steps(8, 30), *FLOAT32)
    assert not on_a_grid(steps(9, 30), *FLOAT32)


def test_one_value_off_the_grid_is_too_many():
    values = steps(-20, 20)
    assert on_a_grid(values, *FLOAT32)
    values[3] += 0.003
    assert not on_a_grid(values, *FLOAT32)


def test_what_a_dtype_could_not_tell_does_not_count():
    """From the 128th step on every number of bfloat16 is on the grid."""
    assert on_a_grid(steps(-20, 20, dtype=torch.bfloat16), *BFLOAT16)
    assert not on_a_grid(steps(128, 256, step=2.0**-8, dtype=torch.bfloat16), *BFLOAT16)


def test_a_step_is_fitted_from_the_small_values_outwards():
    values = steps(1, 128, step=0.0123, dtype=torch.float16)
    held = torch.ones(1, len(values), dtype=torch.bool)
    fitted = folded._fitted(values[None], held, values[None, :1])
    assert abs(float(fitted) / 0.0123 - 1) < 2e-4


def test_columns_are_judged_apart():
    """A column with few values, one on no grid and one with another step, side by side."""
    on, other = steps(-20, 20), steps(-20, 20, step=0.07)
    off = on.clone()
    off[3] += 0.003
    grids = folded._fitted_grids(torch.stack([on, torch.ones(40).double(), off, other]))
    assert grids.columns_on(*FLOAT32) == {0, 3}
