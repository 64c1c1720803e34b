"""The words and commands that answers are written with."""

# Tables: a line of Chinese is wide for its number of characters.
# ruff: noqa: E501


def _words(text: str) -> list[str]:
    return text.split()


TEXT_MACROS = {
    "text", "mbox", "textbf", "textit", "textrm", "textnormal", "textsf", "texttt", "hbox", "emph",
    "mathrm", "mathit", "mathsf", "mathtt", "operatorname", "rm", "bf", "bm", "textup", "underline",
}  # fmt: skip
MATH_FONTS = {"mathit", "bm"}

CONNECTIVES = {
    "and": "and", "or": "or", "und": "and", "oder": "or", "et": "and", "ou": "or", "y": "and",
    "和": "and", "或": "or", "且": "both", "或者": "or", "以及": "and", "与": "and", "及": "and", "并且": "both",
}  # fmt: skip
del CONNECTIVES["y"]  # a variable far more often than Spanish

# Commands that join statements.
LOGIC = {
    "\\land": "both", "\\wedge": "both", "\\lor": "or", "\\vee": "or", "&": "and", "\\&": "and",
}  # fmt: skip

OPERATOR_WORDS = {"mod": "\\mod", "union": "\\cup", "intersect": "\\cap"}

RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "=<": "<=", "=>": "=>",
    "!=": "!=", "\\lt": "<", "\\gt": ">", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=",
    "\\leqq": "<=", "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=", "\\geqq": ">=",
    "\\ne": "!=", "\\neq": "!=", "\\in": "in", "\\approx": "~", "\\simeq": "~", "\\sim": "~",
    "\\doteq": "~", "\\equiv": "=", "\\to": "to", "\\rightarrow": "to", "->": "to",
    "\\cong": "cong", "\\parallel": "parallel", "\\perp": "perp",
    "\\Rightarrow": "=>", "\\implies": "=>", "\\mapsto": "mapsto",
}  # fmt: skip
NEGATED = {"=": "!=", "<": ">=", ">": "<="}

SET_OPERATORS = {
    "\\cup": "union", "\\bigcup": "union", "\\cap": "intersection", "\\setminus": "difference",
    "\\backslash": "difference",
}  # fmt: skip

FUNCTIONS = {
    name: name
    for name in _words(
        "sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan sinh cosh tanh coth "
        "sech csch arcsinh arccosh arctanh asinh acosh atanh ln log lg exp max min gcd lcm abs "
        "floor ceil arg det Re Im"
    )
}
FUNCTIONS |= {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "tg": "tan",
    "ctg": "cot", "cosec": "csc", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh",
    "arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh", "arctg": "atan", "ceiling": "ceil",
}  # fmt: skip
ANALYTIC_FUNCTIONS = _words(
    "sin cos tan cot sec csc asin acos atan acot sinh cosh tanh coth sech csch asinh acosh atanh"
)
INVERTIBLE = {"sin", "cos", "tan", "cot", "sinh", "cosh", "tanh"}

_GREEK = _words(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi "
    "Omega ell hbar partial aleph Upsilon"
)
CONSTANTS = {"pi": "pi", "infty": "infinity", "inf": "infinity", "oo": "infinity"}
NAMES = {name: name for name in _GREEK} | CONSTANTS
NAMES |= {
    "infinity": "infinity", "Infinity": "infinity", "varepsilon": "epsilon", "varphi": "phi",
    "vartheta": "theta", "imath": "i", "exponentialE": "e", "R": "mathbb R",
}  # fmt: skip
CONSTANT_WORDS = {"pi", "Pi", "infty", "inf", "oo", "infinity", "sqrt", "cbrt", "frac"} | {
    name for name in _GREEK if len(name) > 2
}

DECORATIONS = {
    "overline": "bar", "bar": "bar", "vec": "vec", "overrightarrow": "vec", "hat": "hat",
    "widehat": "hat", "tilde": "tilde", "widetilde": "tilde", "dot": "dot", "ddot": "ddot",
    "overarc": "arc", "overparen": "arc", "stackrel": "rel",
}  # fmt: skip

MATRICES = {
    "pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix", "array", "vmatrix", "cases", "dcases",
    "rcases", "aligned", "align", "alignedat", "gathered", "gather", "split", "eqnarray", "equation",
}  # fmt: skip

# Operators that name a quantity of their argument, and words that stand in subscripts.
OPERATORS = set(_words("deg dim ker rank tr Var Cov Pr hom nabla"))
LABELS = set(_words("max min inf sup exp log ln lim det gcd lcm arg abs"))

KNOWN_OPERATORS = OPERATORS | LABELS | set(FUNCTIONS)

FACTOR_COMMANDS = {
    "\\" + name
    for name in _words(
        "frac dfrac tfrac cfrac sqrt cbrt binom dbinom tbinom lfloor lceil sum prod int lim "
        "lvert mathbf mathbb mathcal boldsymbol begin cdots ldots dots "
        "angle triangle measuredangle"
    )
} | {"\\" + name for name in (*FUNCTIONS, *DECORATIONS, *OPERATORS, "jmath")}

ORDINAL_ENDINGS = {"th", "st", "nd", "rd"}

# Text that ends the mathematics: what follows says for which objects it holds.
TAIL_WORDS = {"for", "where", "with", "in", "when"}

# Words that must never be dropped as prose, because they change what is said.
MEANINGFUL_WORDS = {
    "not", "no", "never", "none", "neither", "nor", "non", "except", "without", "excluding", "if",
    "unless", "least", "most", "more", "less", "than", "greater", "fewer", "under", "over", "above",
    "below", "minus", "plus", "times", "negative", "half", "twice", "double", "maybe", "perhaps",
    "possibly", "either", "undefined", "dozen", "hundred", "thousand", "million", "billion",
    "trillion", "percent", "squared", "cubed", "between", "otherwise", "wrong", "incorrect",
    "isn", "doesn", "don", "inverse", "opposite", "non-zero", "even", "odd", "infinite",
    "cannot", "cant", "isnt", "aren", "wasn", "weren", "couldn", "shouldn", "wouldn", "didn", "hasn",
    "haven", "nobody", "nothing", "hardly", "unlikely", "impossible", "false", "untrue", "instead",
    "rather", "exceeds", "exceeding", "beyond", "within", "might", "could", "probably", "reciprocal",
    "factorial", "triple", "thrice", "divided", "multiplied", "subtracted", "halves", "almost",
    "upward", "upwards", "onward", "onwards",
    # German, French, Spanish, Portuguese, Italian, Dutch
    "nicht", "kein", "keine", "nie", "mindestens", "weniger", "mehr", "ohne", "oder", "niet", "geen",
    "minstens", "pas", "moins", "sans", "ni", "jamais", "nunca", "menos", "sin", "mayor",
    "menor", "nem", "sem", "maior", "mais", "mas", "almeno", "meno", "senza", "maggiore", "minore",
}  # fmt: skip
# The same in scripts that are not Latin, as parts of words.
MEANINGFUL_CJK = (
    r"不(?!同|等式|定积分)|没|沒|无(?!理|限)|無|非|未(?!知)|否|别|勿|分之|半(?!径)|零下|负|負|[至最][多少]|"
    r"[大小高低多少早晚][于於]|超[过過]|以[上下内外內]|未満|除了|除以|乘(?!积)|加上|减去|减(?!少)|"
    r"相反数|倒数|平方根|的平方|的立方|次方|次幂|绝对值|阶乘|错|可能|也许|或许|大概率|[两兩]|[成折](?=$)|"
    r"^的(?:倍数|约数|因数)|^多$|ない|ません|以外|아니|않|없|이상|이하|미만|초과|절반|제외|"
    r"\bн[еи]\b|\bнет\b|менее|более|больше|меньше|кроме|минус|половин|выше|ниже|минимум|максимум|\bбез\b"
)

# Words of direction, by what they say: where both sides use some, they must say the same.
_DIRECTION_WORDS = {
    "more": "increase increased increases gain gained rise rose rises risen grow grew up",
    "fewer": "decrease decreased decreases lose lost fall fell falls fallen drop dropped down",
    "profit": "profit", "loss": "loss", "income": "deposit deposited earned income",
    "expense": "withdraw withdrew spent expense", "left": "left", "right": "right", "north": "north",
    "south": "south", "east": "east", "west": "west", "clockwise": "clockwise",
    "anticlockwise": "counterclockwise anticlockwise", "before": "before", "after": "after",
    "than": "more", "less": "less", "increasing": "increasing", "decreasing": "decreasing",
    "forward": "forward forwards", "backward": "backward backwards", "am": "am", "pm": "pm",
}  # fmt: skip
DIRECTIONS = {word: said for said, words in _DIRECTION_WORDS.items() for word in words.split()}
_CJK_DIRECTIONS = {
    "more": "增加 上升 增长 提高 上涨 上调 升高 涨", "fewer": "减少 下降 降低 下跌 下调 跌", "profit": "盈利 盈 赚 获利",
    "loss": "亏损 亏 赔", "income": "收入 存入", "expense": "支出 取出", "left": "向左 左移 左边",
    "right": "向右 右移 右边", "up": "向上", "down": "向下", "north": "北", "south": "南", "east": "东", "west": "西",
    "clockwise": "顺时针", "anticlockwise": "逆时针", "forward": "向前 前进", "backward": "向后 后退",
    "am": "上午 早上 早晨 凌晨", "pm": "下午 晚上 傍晚", "after": "以后 之后", "before": "以前 之前",
}  # fmt: skip
CJK_DIRECTIONS = {word: said for said, words in _CJK_DIRECTIONS.items() for word in words.split()}
# Words before a number that do not name what it is the number of.
FILLERS = {
    "about", "approximately", "around", "only", "the", "answer", "is", "are", "exactly", "total",
    "and", "or", "just", "roughly", "value", "of", "for", "final", "number", "equals",
}  # fmt: skip

# Bare words too short to be told from products of letters by their length.
SHORT_WORDS = {
    "yes", "no", "odd", "one", "two", "six", "ten", "dne", "all", "any", "not", "the", "for", "is",
    "men", "day", "days", "pm", "am", "per", "of", "red", "it", "so", "its", "by", "to", "east",
    "west", "true", "even", "sec", "are", "ways", "was", "has", "can", "but", "nor", "non", "if",
    "usd", "in", "as", "at", "we", "be", "an", "du", "de", "le", "la", "rs", "sq", "cu",
}  # fmt: skip

# Words that scale the number before them.
MULTIPLIERS = {
    "hundred": "100", "thousand": "1000", "million": "1000000", "billion": "1000000000",
    "trillion": "1000000000000", "dozen": "12", "十": "10", "百": "100", "千": "1000",
    "万": "10000", "亿": "100000000", "兆": "1000000000000",
}  # fmt: skip
