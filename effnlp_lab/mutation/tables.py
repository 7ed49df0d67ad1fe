"""Counterparts: what an operator, a function or a dtype is changed to; and names that are special."""

from __future__ import annotations

import ast

WORDS: dict[type, str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.LShift: "shl",
    ast.RShift: "shr",
    ast.BitAnd: "bitand",
    ast.BitOr: "bitor",
    ast.BitXor: "bitxor",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Is: "is",
    ast.IsNot: "isnot",
    ast.In: "in",
    ast.NotIn: "notin",
    ast.And: "and",
    ast.Or: "or",
}
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
SCALING = (ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
TERMS = (ast.Add, ast.Sub, ast.BitAnd, ast.BitOr)
COMMUTATIVE = (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr)

_TWINS = (
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("minimum", "maximum"),
    ("fmin", "fmax"),
    ("cummin", "cummax"),
    ("any", "all"),
    ("floor", "ceil"),
    ("exp", "exp2"),
    ("log", "log2"),
)
TWIN = {a: b for pair in _TWINS for a, b in (pair, pair[::-1])}
DTYPES = {"float32": ("float16", "float64"), "float16": ("float32",), "bfloat16": ("float32",), "float64": ("float32",)}
CASTS = {"float", "double", "half", "to", "type", "long", "int", "clone"}
# calls whose arguments may be swapped: that is no mistake
SYMMETRIC = {
    "add",
    "allclose",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "cosine_similarity",
    "eq",
    "equal",
    "fmax",
    "fmin",
    "gcd",
    "hypot",
    "isclose",
    "l1_loss",
    "lcm",
    "logaddexp",
    "logical_and",
    "logical_or",
    "logical_xor",
    "max",
    "maximum",
    "min",
    "minimum",
    "mse_loss",
    "mul",
    "multiply",
    "ne",
    "smooth_l1_loss",
    "swapaxes",
    "swapdims",
    "transpose",
}
# keywords that change where or how fast something runs, or what wrong input meets, and no result on a CPU
SILENT = {
    "allow_tf32",
    "cache_modifier",
    "device",
    "eviction_policy",
    "flush",
    "input_precision",
    "maxnreg",
    "non_blocking",
    "num_ctas",
    "num_stages",
    "num_warps",
    "pin_memory",
    "strict",
    "volatile",
    "warp_specialize",
}
