"""`calculator`: exact arithmetic by a small grammar of its own. Nothing is evaluated as Python, and sizes are bounded.

sum      = product (("+" | "-") product)*
product  = signed (("*" | "×" | "/" | "÷" | "//" | "%" | mod) signed)*      % before a number: the remainder
signed   = ("+" | "-")* power
power    = atom "%"? (("^" | "**") signed)?                                   else: hundredths
atom     = number | "(" sum ")" | name "(" sum ("," sum)* ")"
name     = sqrt | abs | min | max | round | floor | ceil
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 1000  # characters of an expression
DEEPEST = 50  # brackets, signs and powers inside one another
MOST_BITS = 4096  # of a numerator or denominator on the way: about 1,200 digits
DECIMALS = 10  # of a result whose decimals do not end, or of which there are more

_TOKEN = re.compile(
    r"\s*(?:(\d[\d,_]*\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)|(//|\*\*|[-+*/%^(),×÷−])|([A-Za-z]+))",
    re.ASCII,
)
_GROUPED = re.compile(r"\d{1,3}(,\d{3})+(\.\d*)?")
_SAME = {"×": "*", "÷": "/", "−": "-", "**": "^"}


class Refused(Exception):
    """Why an expression has no value, in words that the one who wrote it can use."""


def calculate(expression: str) -> str:
    """The value in digits: exact where its decimals end within `DECIMALS` places, else rounded to that many.

    `48/2` -> `24`, `1/8` -> `0.125`, `2/3` -> `0.6666666667`. `1,234.5` and `$5` are numbers, `20%` is a fifth.
    Raises Refused for anything else than arithmetic, a division by zero, and what is too long, deep or large.
    """
    if len(expression) > LONGEST:
        raise Refused(f"the expression has {len(expression):,} characters; at most {LONGEST:,}")
    return written(_Reader(_tokens(expression.replace("$", ""))).whole())


def written(value: Fraction) -> str:
    """A number in digits, as `calculate` gives it."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**DECIMALS)
    sign, digits = "-" if scaled < 0 else "", str(abs(scaled)).rjust(DECIMALS + 1, "0")
    text = f"{digits[:-DECIMALS]}.{digits[-DECIMALS:]}".rstrip("0").rstrip(".")
    return sign + text if scaled else "0"


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise Refused(f"{text[at:].strip()[:1]!r} is not arithmetic")
        token = match.group().strip()
        found.append(_SAME.get(token, token))
        at = match.end()
    return found


class _Reader:
    """One pass over the tokens, from left to right."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.depth = _apart(tokens), 0, 0

    def whole(self) -> Fraction:
        if not self.tokens:
            raise Refused("the expression is empty")
        value = self.sum()
        if self.next:
            raise Refused(f"{self.next!r} stands where an operator was expected")
        return value

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """The next token where it is one of `wanted`, else ""."""
        if self.next not in wanted:
            return ""
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self) -> Fraction:
        value = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while sign := self.take("*", "/", "//", "%", "mod"):
            other = self.signed()
            if sign != "*" and other == 0:
                raise Refused("division by zero")
            value = _bounded(_PRODUCTS[sign](value, other))
        return value

    def signed(self) -> Fraction:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Refused(f"more than {DEEPEST} brackets, signs and powers inside one another")
        sign = self.take("+", "-")
        value = (-1 if sign == "-" else 1) * self.signed() if sign else self.power()
        self.depth -= 1
        return value

    def power(self) -> Fraction:
        value = self.atom()
        if self.next == "%" and not self.starts_at(self.at + 1):
            self.at += 1
            value /= 100
        return _power(value, self.signed()) if self.take("^") else value

    def starts_at(self, place: int) -> bool:
        """Whether a number, name or bracket begins there, so that the % before it is the remainder."""
        token = self.tokens[place] if place < len(self.tokens) else "mod"
        return token != "mod" and (token[0] in "(.0123456789" or token.isalpha())

    def atom(self) -> Fraction:
        token = self.next
        self.at += 1
        if token == "(":
            value = self.sum()
            self.close()
            return value
        if token in _FUNCTIONS:
            if not self.take("("):
                raise Refused(f"{token} wants brackets: {token}(…)")
            values = [self.sum()]
            while self.take(","):
                values.append(self.sum())
            self.close()
            return _bounded(_FUNCTIONS[token](values))
        if token[:1].isdigit() or token[:1] == ".":
            return _number(token)
        if token.isalpha():
            raise Refused(f"{token!r} is not a number; known names: {', '.join(_FUNCTIONS)}")
        raise Refused(f"a number was expected {'before ' + repr(token) if token else 'at the end'}")

    def close(self) -> None:
        if not self.take(")"):
            raise Refused("a bracket is not closed")


def _apart(tokens: list[str]) -> list[str]:
    """The tokens with `2,3` as two arguments inside a function's brackets, where `1,234` of a sum is one number."""
    inside: list[bool] = []
    found: list[str] = []
    for index, token in enumerate(tokens):
        if token == "(":
            inside.append(index > 0 and tokens[index - 1] in _FUNCTIONS)
        elif token == ")" and inside:
            inside.pop()
        if "," in token and token != ",":
            pieces = token.split(",")
            if any(inside):
                found += [part for piece in pieces for part in (",", piece) if part][1:]
                continue
        found.append(token)
    return found


def _number(token: str) -> Fraction:
    if "," in token and not _GROUPED.fullmatch(token):
        raise Refused(f"{token!r} is not a number: a comma stands before every three digits, as in 1,234")
    mantissa, _, exponent = token.replace(",", "").replace("_", "").lower().partition("e")
    if abs(int(exponent or 0)) > MOST_BITS // 4:
        raise Refused("the number is too large")
    return _bounded(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise Refused("the number is too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if base == 0 and exponent < 0:
        raise Refused("division by zero")
    if exponent.denominator != 1:
        if exponent.denominator == 2 and base >= 0:
            return _power(_root(base), Fraction(exponent.numerator))
        raise Refused("a power wants a whole number, or halves of a number that is not negative")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > MOST_BITS or size * abs(exponent) > 2 * MOST_BITS:
        if abs(base) == 1 or base == 0:
            return base if exponent % 2 else abs(base)
        raise Refused("the number is too large")
    return _bounded(base**exponent.numerator)


def _root(value: Fraction) -> Fraction:
    """The square root: exact where there is one, else cut behind twice the decimals that are written."""
    if value < 0:
        raise Refused("the square root of a negative number")
    top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if Fraction(top, bottom) ** 2 == value:
        return Fraction(top, bottom)
    scale = 10 ** (2 * DECIMALS)
    return Fraction(math.isqrt(value.numerator * scale**2 // value.denominator), scale)


def _one(values: list[Fraction], name: str) -> Fraction:
    if len(values) != 1:
        raise Refused(f"{name} takes one number, not {len(values)}")
    return values[0]


def _round(values: list[Fraction]) -> Fraction:
    """To the nearest, halves away from zero as people round; with a second number to that many decimals."""
    if len(values) > 2 or any(places.denominator != 1 or abs(places) > 100 for places in values[1:]):
        raise Refused("round takes a number and how many decimals to keep")
    scale = Fraction(10) ** (values[1].numerator if len(values) == 2 else 0)
    scaled = values[0] * scale
    nearest = math.floor(abs(scaled) + Fraction(1, 2))
    return Fraction(-nearest if scaled < 0 else nearest) / scale


_PRODUCTS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: Fraction(a // b),
    "%": lambda a, b: a % b,
    "mod": lambda a, b: a % b,
}
_FUNCTIONS: dict[str, Callable[[list[Fraction]], Fraction]] = {
    "sqrt": lambda values: _root(_one(values, "sqrt")),
    "abs": lambda values: abs(_one(values, "abs")),
    "min": min,
    "max": max,
    "round": _round,
    "floor": lambda values: Fraction(math.floor(_one(values, "floor"))),
    "ceil": lambda values: Fraction(math.ceil(_one(values, "ceil"))),
}
