# %% [markdown]
# # Lesson 12, solution: a calculator that nobody can turn against you
#
# Python parses the expression, and we walk over the tree and take four operations on numbers and nothing else. No
# line of the text is ever run. Powers are left out: `9**9**9` alone would take all memory.

# %%
import ast
import operator

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(node: ast.AST) -> float:
    if isinstance(node, ast.Expression):
        return value(node.body)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("not arithmetic")


def exercise(expression: str) -> str:
    if len(expression) > 100:
        return "error"
    try:
        found = value(ast.parse(expression, mode="eval"))
        return str(int(found)) if found == int(found) else str(found)
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return "error"
