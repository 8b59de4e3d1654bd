"""Exact arithmetic, and nothing else than arithmetic."""

import ast
import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_kit.tools.calculator import MOST_BITS, Refused, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"), ("1/8", "0.125"), ("2/3", "0.6666666667"), ("-1/3", "-0.3333333333"), ("0.1+0.2", "0.3"),
        ("1,234.5*2", "2469"), ("$5.50 + 1", "6.5"), ("20% * 50", "10"), ("7 % 3", "1"), ("7 mod 3", "1"),
        ("-2^2", "-4"), ("2**10", "1024"), ("2^-1", "0.5"), ("4^0.5", "2"), ("3×4÷2−1", "5"), ("-7//2", "-4"),
        ("sqrt(9/4)", "1.5"), ("sqrt(2)", "1.4142135624"), ("max(1,2,3)", "3"), ("round(2.345, 2)", "2.35"),
        ("round(-2.5)", "-3"), ("floor(-0.5)", "-1"), ("1e5", "100000"), ("0.00000000001", "0"),
        ("123456789123456789 * 987654321987654321", str(123456789123456789 * 987654321987654321)),
    ],
)  # fmt: skip
def test_a_value_is_exact_and_written_in_digits(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "2+", "3 4", "(1", "1)", "1/0", "0^-1", "5 % 0", "sqrt(-1)", "import os", "__import__('os')", "x", "²", "1,23",
     "9^9^9", "1e4000", "2^(1/3)", "sqrt 4", "round(1, 0.5)", "abs(1, 2)", "(" * 60 + "1" + ")" * 60, "1" * 1001,
     "[1]", "1 if 1 else 2", "9" * 900 + "*" + "9" * 90 + "^ 9"],
)  # fmt: skip
def test_what_is_no_arithmetic_or_too_large_is_refused_in_words(expression: str) -> None:
    with pytest.raises(Refused, match=r"\w"):
        calculate(expression)


@given(
    st.recursive(
        st.integers(0, 10**6).map(str),
        lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda part: f"({' '.join(part)})"),
        max_leaves=12,
    )
)
def test_it_agrees_with_python_s_fractions(expression: str) -> None:
    ways = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return ways[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant)
        return Fraction(node.value)

    try:
        right = value(ast.parse(expression, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(Refused, match="division by zero"):
            calculate(expression)
        return
    found = Fraction(calculate(expression))
    assert abs(found - right) <= Fraction(1, 2 * 10**10)
    assert found == right or right.denominator != 1


def test_no_number_grows_past_its_bound_however_it_is_made() -> None:
    biggest = f"2^{MOST_BITS - 1}"
    assert len(calculate(biggest)) == 1233
    for expression in (f"{biggest} * {biggest}", f"1/{biggest}/{biggest}", f"({biggest})^2", "1.5^4000"):
        with pytest.raises(Refused, match="too large"):
            calculate(expression)
