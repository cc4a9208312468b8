"""Names that differ in numbers, as one line: exact, whatever the numbers are."""

import re
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from quantpass.basics.folding import folded


def texts(names):
    return [str(f) for f in folded(names)]


def test_layers_are_one_line():
    names = [f"model.layers.{i}.self_attn.{p}" for i in range(94) for p in ("q_proj", "o_proj")]
    assert texts(names) == ["model.layers.{0..93}.self_attn.q_proj x94", "model.layers.{0..93}.self_attn.o_proj x94"]


def test_layers_and_experts_are_one_line():
    names = [f"layers.{i}.experts.{e}.up" for i in range(3, 6) for e in range(128)]
    assert texts(names) == ["layers.{3..5}.experts.{0..127}.up x384"]


def test_what_is_missing_shows():
    assert texts(["a.0.b", "a.1.b", "a.2.b", "a.5.b"]) == ["a.{0..2,5}.b x4"]
    assert texts(f"a.{i}.{j}" for i, j in product(range(3), range(3)) if (i, j) != (1, 2)) == [
        "a.{0,2}.{0..2} x6",
        "a.1.{0,1} x2",
    ]


def test_names_without_numbers_or_told_twice():
    assert texts(["lm_head", "a.0", "a.1", "a.1", "w1.x"]) == ["lm_head", "a.0", "a.1 x2", "w1.x"]
    assert texts([""]) == [""]


def test_numbers_that_would_not_come_back_stay_text():
    assert texts(["a.01.b", "a.1.b", "a.٣.b"]) == ["a.01.b", "a.1.b", "a.٣.b"]


def unfolded(text):
    """Every name that a fold stands for."""
    parts = [[part] for part in re.split(r"(\{[^}]*\})", text)]
    for i, (part,) in enumerate(parts):
        if part.startswith("{"):
            runs = [run.split("..") for run in part[1:-1].split(",")]
            parts[i] = [str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)]
    return ["".join(choice) for choice in product(*parts)]


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3).map(lambda t: "{}.x.{}.y.{}".format(*t)), max_size=30))
def test_a_fold_stands_for_its_names_and_no_other(names):
    folds = folded(names)
    assert sorted({n for f in folds for n in unfolded(f.text)}) == sorted(set(names))
    assert sum(f.count for f in folds) == len(names)
