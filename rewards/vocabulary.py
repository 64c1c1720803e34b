"""The words and commands that answers are written with."""


def _words(text: str) -> list[str]:
    return text.split()


TEXT_MACROS = {
    "text", "mbox", "textbf", "textit", "textrm", "textnormal", "textsf", "texttt", "hbox", "emph",
    "mathrm", "mathit", "mathsf", "mathtt", "operatorname", "rm", "bf", "bm", "textup", "underline",
}  # fmt: skip
MATH_FONTS = {"mathit", "bm"}

CONNECTIVES = {
    "and": "and", "or": "or", "und": "and", "oder": "or", "et": "and", "ou": "or", "y": "and",
    "和": "and", "或": "or", "且": "and", "或者": "or", "以及": "and", "与": "and",
}  # fmt: skip
del CONNECTIVES["y"]  # a variable far more often than Spanish

OPERATOR_WORDS = {"mod": "\\mod", "union": "\\cup", "intersect": "\\cap"}

RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "=<": "<=", "=>": "=>",
    "!=": "!=", "\\lt": "<", "\\gt": ">", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=",
    "\\leqq": "<=", "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=", "\\geqq": ">=",
    "\\ne": "!=", "\\neq": "!=", "\\in": "in", "\\approx": "~", "\\simeq": "~", "\\sim": "~",
    "\\doteq": "~", "\\equiv": "=", "\\to": "to", "\\rightarrow": "to", "->": "to",
    "\\cong": "cong", "\\parallel": "parallel", "\\perp": "perp",
    "\\Rightarrow": "=>", "\\implies": "=>", "\\mapsto": "to",
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
    "pmatrix",
    "bmatrix",
    "Bmatrix",
    "matrix",
    "smallmatrix",
    "array",
    "vmatrix",
    "cases",
    "aligned",
}

FACTOR_COMMANDS = {
    "\\" + name
    for name in _words(
        "frac dfrac tfrac cfrac sqrt cbrt binom dbinom tbinom lfloor lceil sum prod int lim "
        "lvert mathbf mathbb mathcal boldsymbol begin cdots ldots dots "
        "angle triangle measuredangle"
    )
} | {"\\" + name for name in (*FUNCTIONS, *DECORATIONS)}

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
}  # fmt: skip

# Words of direction: where both sides use them, they must be the same ones.
DIRECTIONS = {
    "increase", "decrease", "profit", "loss", "gain", "left", "right", "up", "down", "north",
    "south", "east", "west", "clockwise", "counterclockwise", "before", "after", "more", "less",
    "increasing", "decreasing", "rise", "fall", "forward", "backward",
}  # fmt: skip
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
    "usd", "in", "as", "at", "we", "be", "an", "du", "de", "le", "la", "rs",
}  # fmt: skip

# Unit words, in one spelling each. Single letters are units only after a number in a text macro,
# where they cannot be variables.
_UNIT_SPELLINGS = {
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres 厘米",
    "dm": "dm decimeter decimeters",
    "meter": "meter meters metre metres m 米",
    "km": "km kilometer kilometers kilometre kilometres 千米 公里",
    "inch": "inch inches",
    "foot": "foot feet ft",
    "yard": "yard yards yd",
    "mile": "mile miles mi",
    "mg": "mg milligram milligrams",
    "gram": "gram grams g 克",
    "kg": "kg kilogram kilograms kgs 千克 公斤",
    "pound": "pound pounds lb lbs",
    "ounce": "ounce ounces oz",
    "ton": "ton tons tonne tonnes 吨",
    "second": "second seconds sec secs s 秒",
    "minute": "minute minutes min mins 分钟",
    "hour": "hour hours hr hrs h 小时 时",
    "day": "day days 天 日",
    "week": "week weeks 周",
    "month": "month months 月",
    "year": "year years yr yrs 年",
    "dollar": "dollar dollars usd bucks 美元",
    "cent": "cent cents",
    "euro": "euro euros",
    "yuan": "yuan rmb 元",
    "liter": "liter liters litre litres l 升",
    "ml": "ml milliliter milliliters 毫升",
    "gallon": "gallon gallons",
    "degree": "degree degrees deg degs 度",
    "radian": "radian radians rad rads",
    "mph": "mph",
    "kph": "kph kmh",
    "square": "square sq 平方",
    "cubic": "cubic cu 立方",
    "unit": "unit units",
    "%": "percent pct",
    "am": "am",
    "pm": "pm",
}
# Words that scale the number before them, and whole answers written as a word.
MULTIPLIERS = {
    "hundred": "100", "thousand": "1000", "million": "1000000", "billion": "1000000000",
    "trillion": "1000000000000", "dozen": "12", "万": "10000", "亿": "100000000",
}  # fmt: skip
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        _words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
            "fifteen sixteen seventeen eighteen nineteen twenty"
        )
    )
}

UNITS = {word: unit for unit, words in _UNIT_SPELLINGS.items() for word in words.split()}

# Units that convert into each other: what they measure, and how many of the base unit they are.
CONVERSIONS = {
    "mm": ("length", "1/1000"), "cm": ("length", "1/100"), "dm": ("length", "1/10"),
    "meter": ("length", "1"), "km": ("length", "1000"), "inch": ("length", "127/5000"),
    "foot": ("length", "381/1250"), "yard": ("length", "1143/1250"),
    "mile": ("length", "201168/125"), "mg": ("mass", "1/1000"), "gram": ("mass", "1"),
    "kg": ("mass", "1000"), "ton": ("mass", "1000000"), "second": ("time", "1"),
    "minute": ("time", "60"), "hour": ("time", "3600"), "day": ("time", "86400"),
    "week": ("time", "604800"), "dollar": ("money", "1"), "cent": ("money", "1/100"),
    "liter": ("volume", "1"), "ml": ("volume", "1/1000"),
}  # fmt: skip
