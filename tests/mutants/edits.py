"""One-operator edits of the pass's own files: comparisons, and/or/not, arithmetic and signs.

The edits are cosmic-ray's, of its many variants those that a slip would make: a comparison negated or moved by its
boundary, a sign turned, a condition joined the other way.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.boolean_replacer import ReplaceAndWithOr, ReplaceOrWithAnd
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).resolve().parents[2]

FILES = (
    # reading
    "patterns/affine.py",
    "patterns/contractions.py",
    "patterns/epilogues.py",
    "patterns/integers.py",
    "quantpass/graph/decode.py",
    "quantpass/graph/instructions.py",
    "quantpass/graph/node_memo.py",
    "patterns/proof.py",
    "patterns/terms.py",
    "patterns/weights.py",
    "patterns/weights_by_value.py",
    "patterns/weights_in_blocks.py",
    "patterns/code_lines.py",
    "patterns/operands.py",
    "quantpass/graph/grids.py",
    "quantpass/graph/row_blocks.py",
    "quantpass/graph/expr.py",
    "patterns/sites.py",
    "patterns/activations.py",
    "patterns/magnitudes.py",
    "patterns/steps.py",
    "patterns/norms.py",
    "patterns/derived.py",
    "patterns/net.py",
    "patterns/unread_matmuls.py",
    "patterns/subgraphs.py",
    "quantpass/graph/static_values.py",
    "quantpass/basics/symbolic.py",
    # composing
    "quantpass/planning/composition.py",
    "quantpass/planning/quant_product.py",
    # planning
    "quantpass/planning/candidates.py",
    "quantpass/planning/guards.py",
    "quantpass/planning/quant_matmul.py",
    "quantpass/planning/quant_matmul_dequant.py",
    "quantpass/planning/norms.py",
    "quantpass/planning/weight_quant_matmul.py",
    "quantpass/planning/choose.py",
    "quantpass/planning/requantize.py",
    "quantpass/planning/half_product.py",
    "quantpass/planning/permissions.py",
    "quantpass/planning/refit.py",
    # rewriting
    "quantpass/graph/merge.py",
    "quantpass/rewrite.py",
    "quantpass/graph/writes.py",
)

_COMPARISONS = ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt")
_ARITHMETIC = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul", "LShift_RShift")
_SETS = ("BitOr_BitAnd", "BitAnd_BitOr")
_UNARY = ("Delete_Not", "Delete_USub")


class ReplaceIn(Operator):
    """``in`` made ``not in`` and the reverse, which cosmic-ray lacks."""

    def mutation_positions(self, node):
        if node.type == "comparison":
            for op in node.children[1::2]:
                if op.get_code().split() in (["in"], ["not", "in"]):
                    yield op.start_pos, op.end_pos

    def mutate(self, node, index):
        points = [i for i, op in enumerate(node.children) if op.get_code().split() in (["in"], ["not", "in"])]
        turned = " not in" if node.children[points[index]].get_code().split() == ["in"] else " in"
        node.children[points[index]] = parso.parse(turned)
        return node

    @classmethod
    def examples(cls):
        return ()


def _operators() -> list[Operator]:
    known = OperatorProvider()
    names = [
        *(f"ReplaceComparisonOperator_{n}" for n in (*_COMPARISONS, "Is_IsNot", "IsNot_Is")),
        *(f"ReplaceBinaryOperator_{n}" for n in (*_ARITHMETIC, *_SETS)),
        *(f"ReplaceUnaryOperator_{n}" for n in _UNARY),
    ]
    return [*(known[n]() for n in names), ReplaceAndWithOr(), ReplaceOrWithAnd(), ReplaceIn()]


@dataclass(frozen=True, slots=True)
class Edit:
    """One operator of one file, replaced.

    Attributes:
        file: path from the root.
        operator: name of the edit's kind.
        occurrence: which of the operator's positions in the file.
        function: qualified name of the function around it, ``"<module>"`` outside of any.
        first: line of the function's ``def``; 1 outside of any.
        lines: first and last line of the statement that is edited.
        line: the line that is edited, from 1.
        before: its text.
        after: its text once edited.
        source: the whole file, edited.
    """

    file: str
    operator: str
    occurrence: int
    function: str
    first: int
    lines: tuple[int, int]
    line: int
    before: str
    after: str
    source: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}\n    - {self.before}\n    + {self.after}"


def sample(count: int, seed: int, files: tuple[str, ...] = FILES) -> list[Edit]:
    """``count`` edits, each as likely as any other."""
    every = [(file, operator, occurrence) for file in files for operator, occurrence in _positions(file)]
    return [_edit(*drawn) for drawn in random.Random(seed).sample(every, min(count, len(every)))]


def _positions(file: str) -> Iterator[tuple[Operator, int]]:
    """Every kind of edit of ``file``, with which of the kind's positions it is."""
    source = (ROOT / file).read_text()
    skipped = list(_no_values(ast.parse(source)))
    nodes = list(ast_nodes(get_ast(source)))
    for operator in _operators():
        positions = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, position in enumerate(positions):
            if not any(start <= position < end for start, end in skipped):
                yield operator, occurrence


def _edit(file: str, operator: Operator, occurrence: int) -> Edit:
    source = (ROOT / file).read_text()
    edited = mutate_code(source, operator, occurrence)
    pairs = zip(source.split("\n"), edited.split("\n"), strict=True)
    ((line, before, after),) = [(i, a.strip(), b.strip()) for i, (a, b) in enumerate(pairs, 1) if a != b]
    function, first, lines = places_of(source)[line]
    return Edit(file, type(operator).__name__, occurrence, function, first, lines, line, before, after, edited)


def _no_values(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a ``|`` or ``*`` is no operator on values: in types, in patterns, in the heads of functions, unpacking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield (node.lineno, node.col_offset), (node.body[0].lineno, 0)
        if isinstance(node, ast.Dict):
            unpacked = (v for k, v in zip(node.keys, node.values, strict=True) if k is None)
            yield from (((v.lineno, v.col_offset - 2), (v.lineno, v.col_offset)) for v in unpacked)
        found = [getattr(node, "annotation", None), getattr(node, "pattern", None)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "cast"):
            found.extend(node.args[1:] if node.func.id == "isinstance" else node.args[:1])
        for t in found:
            if t is not None:
                yield (t.lineno, t.col_offset), (t.end_lineno, t.end_col_offset)


@cache
def places_of(source: str) -> dict[int, tuple[str, int, tuple[int, int]]]:
    """By line: the function around it, the line of its ``def``, and first and last line of the statement.

    What runs once in a process, whichever test comes first, counts as outside of functions: module level, and the
    bodies of cached functions.
    """
    places: dict[int, tuple[str, int, tuple[int, int]]] = {}

    def visit(statements: list[ast.stmt], function: str, first: int, prefix: str) -> None:
        for s in statements:
            bodies = [getattr(s, name, []) for name in ("body", "orelse", "finalbody")]
            bodies += [h.body for h in getattr(s, "handlers", [])]
            bodies += [c.body for c in getattr(s, "cases", [])]
            inner = min((b[0].lineno for b in bodies if b), default=s.end_lineno + 1)
            start = min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", []))])
            for line in range(start, s.end_lineno + 1):
                places[line] = (function, first, (start, max(inner - 1, start)))
            if isinstance(s, ast.FunctionDef):
                once = any("cache" in ast.unparse(d) for d in s.decorator_list)
                inside = (function, first) if once or function != "<module>" else (prefix + s.name, s.lineno)
                visit(s.body, *inside, prefix)
            elif isinstance(s, ast.ClassDef):
                visit(s.body, function, first, f"{prefix}{s.name}.")
            else:
                for body in bodies:
                    visit(body, function, first, prefix)

    visit(ast.parse(source).body, "<module>", 1, "")
    return places
