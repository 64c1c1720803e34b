"""What a TeX command stands for, with the arguments that follow it."""

from functools import partial
from typing import TYPE_CHECKING, cast

from rewards.math import vocabulary as voc
from rewards.math.cursor import END
from rewards.math.lexer import ParseError, Token
from rewards.math.node import MINUS_ONE, Node, join_factors, make_matrix, read_number

if TYPE_CHECKING:
    from rewards.math.parser import Parser


def parse_command(parser: "Parser") -> Node:
    name = parser.take().text[1:]
    if name in ("frac", "dfrac", "tfrac", "cfrac"):
        top = parser.take_single()
        return Node("frac", (top, parser.take_single()))
    if name in ("binom", "dbinom", "tbinom"):
        top = parser.take_single()
        return Node("binomial", (top, parser.take_single()))
    if name in ("sqrt", "cbrt"):
        return _parse_root(parser, name)
    if name in ("lfloor", "lceil"):
        inside = parser.nested(parser.parse_sum)
        parser.expect("\\rfloor" if name == "lfloor" else "\\rceil")
        return Node("function", (inside,), name[1:])
    if name == "langle":
        inside = parser.nested(parser.parse_list)
        parser.expect("\\rangle")
        return Node("tuple", inside.args if inside.kind == "list" else (inside,), "()")
    if name == "begin":
        return _parse_environment(parser)
    if name in ("sum", "prod", "int", "lim", "oint", "iint"):
        return _parse_big(parser, name)
    if name in voc.FUNCTIONS:
        return _parse_function(parser, voc.FUNCTIONS[name])
    if name in voc.DECORATIONS:
        inner = parser.take_single()
        return Node("index", (inner, Node("text", (), voc.DECORATIONS[name])))
    if name in ("mathbb", "mathcal", "mathbf", "boldsymbol"):
        inner = parser.take_single()
        if inner.kind != "name":
            return inner
        node = Node("name", (), name.replace("boldsymbol", "mathbf") + " " + inner.value)
        if parser.token.text in ("[", "(") and node.value in ("mathbb E", "mathbb P"):
            return parser.parse_expectation(node)
        return node
    if name in voc.OPERATORS:  # \deg f, \dim V
        inside = parser.nested(parser.parse_power)
        return Node("index", (inside, Node("text", (), name)))
    if name == "jmath":
        return Node("name", (), "j")
    if name in ("emptyset", "varnothing"):
        return Node("set", ())
    if name in ("ldots", "dots", "cdots", "dotsc", "dotsb", "vdots"):
        return Node("dots")
    if name in ("angle", "triangle", "measuredangle"):
        letters = [parser.parse_atom()]
        while parser.token.kind == "word" and parser.token.text.isupper() and len(letters) < 6:
            letters.append(parser.parse_atom())
        return Node("index", (*letters, Node("text", (), name)))
    if name in voc.NAMES:
        node = Node("name", (), voc.NAMES[name])
        if name not in voc.CONSTANTS and parser.token.text == "(" and not parser.token.space:
            return parser.parse_application(node)
        return node
    raise ParseError(f"unknown command \\{name[:20]}")


def _parse_root(parser: "Parser", name: str) -> Node:
    degree = Node("number", (), read_number("3" if name == "cbrt" else "2"))
    if parser.accept("["):
        degree = parser.nested(parser.parse_sum)
        parser.expect("]")
    in_brackets = parser.token.text == "("
    inside = parser.nested(parser.parse_brackets) if in_brackets else parser.take_single()
    return Node("root", (inside, degree))


def _parse_function(parser: "Parser", name: str) -> Node:
    subscript = exponent = None
    while parser.token.text in ("_", "^"):
        if parser.take().text == "_":
            subscript = parser.parse_script()
        else:
            exponent = parser.parse_script()
    if parser.accept("\\{"):
        inside = parser.parse_brace("\\}")
        args = inside.args if inside.kind == "set" else (inside,)
    elif parser.token.text in ("(", "[") or (parser.token.text == "{" and not parser.token.space):
        is_group = parser.token.text == "{"
        inside = parser.nested(parser.take_single if is_group else parser.parse_brackets)
        args = inside.args if inside.kind in ("tuple", "list") else (inside,)
    else:
        args = (_parse_bare_argument(parser),)
    node = Node("function", args, name)
    if subscript is not None:
        if name not in ("log", "lg"):
            raise ParseError("subscript on a function")
        node = Node("function", (*args, subscript), "log")
    if exponent is None:
        return node
    if exponent == MINUS_ONE and name in voc.INVERTIBLE:
        return Node("function", args, "a" + name)
    return Node("pow", (node, exponent))


def _parse_bare_argument(parser: "Parser") -> Node:
    """``\\sin 2x``: a run of factors, up to the next operator or function name."""
    sign = parser.accept("-")
    argument = parser.nested(parser.parse_power)
    while parser.starts_factor() and parser.token.text[1:] not in voc.FUNCTIONS:
        argument = join_factors(argument, parser.nested(parser.parse_power))
    return Node("neg", (argument,)) if sign else argument


def _parse_big(parser: "Parser", name: str) -> Node:
    """Sums, products, integrals and limits: bounds, then a body as long as a term."""
    lower = upper = None
    while parser.token.text in ("_", "^"):
        if parser.take().text == "_":
            lower = parser.parse_script()
        else:
            upper = parser.parse_script()
    body = parser.nested(parser.parse_product)
    return Node("big", cast("tuple[Node, ...]", (lower, upper, body)), name)


def _parse_environment(parser: "Parser") -> Node:
    parser.expect("{")
    words: list[str] = []
    while not parser.accept("}"):
        token = parser.take()
        if token.kind == "end" or len(words) > 12:
            raise ParseError("unknown environment")
        words.append(token.text)
    name = "".join(words)
    if name.rstrip("*") not in voc.MATRICES or name.lower() == "vmatrix":  # a determinant
        raise ParseError(f"unknown environment {name[:20]}")
    if name == "array":
        parser.expect("{")
        while not parser.accept("}"):
            if parser.take().kind == "end":
                raise ParseError("unclosed column specification")
    if name.rstrip("*") in ("alignedat", "alignat"):
        parser.take_single()
    _drop_alignment(parser)
    rows = parser.nested(partial(_parse_rows, parser))
    while not parser.accept("}"):
        if parser.take().kind == "end":
            raise ParseError("unclosed environment")
    if all(len(row) == 1 and row[0].kind in ("relation", "list") for row in rows):
        lines = [row[0].args if row[0].kind == "list" else row for row in rows]
        return Node("list", sum(lines, ()), ",")  # a system of equations
    return make_matrix(rows)


def _drop_alignment(parser: "Parser") -> None:
    """Drop, up to the end of the environment, ``&`` beside a relation and what ends a row.

    A row that begins with a relation continues the row before: ``x &= 6/2 \\\\ &= 3``.
    """
    kept: list[Token] = []
    depth, at = 1, parser.at
    while at < len(parser.tokens) and depth:
        token, following = (
            parser.tokens[at],
            parser.tokens[at + 1] if at + 1 < len(parser.tokens) else END,
        )
        depth += (token.text == "\\begin") - (token.text == "\\end")
        before = kept[-1].text if kept else ""
        is_mark = token.text == "&" and (
            following.text in voc.RELATIONS or (before in voc.RELATIONS and before != "\\to")
        )
        ends_row = token.text in (",", ".", ";") and following.text in ("\\\\", "\\end")
        if token.text == "&" and before == "\\\\" and following.text in voc.RELATIONS:
            kept.pop()
        if not is_mark and not ends_row:
            kept.append(token)
        at += 1
    parser.tokens[parser.at : at] = kept


def _parse_rows(parser: "Parser") -> tuple[tuple[Node, ...], ...]:
    rows: list[tuple[Node, ...]] = []
    row: list[Node] = []
    while True:
        while parser.accept("\\hline"):
            pass
        if parser.accept("\\end"):
            parser.expect("{")
            break
        row.append(parser.parse_list())
        if parser.accept("&"):
            continue
        rows.append(tuple(row))
        row = []
        if not parser.accept("\\\\"):
            parser.expect("\\end")
            parser.expect("{")
            break
    return tuple(rows)
