"""Which license a derivative may carry: a table of cases."""

import pytest

from r1pipe.publish.licenses import LicenseSource, settle_license
from r1pipe.utils.errors import UserError

ROLES = {"base": "base model", "teacher": "teacher", "data": "data"}

# (sources, --license, the result or words of the refusal)
CASES = [
    ("data:cc0-1.0", None, "apache-2.0"),
    ("data:cc0-1.0", "mit", "mit"),
    ("base:mit data:cc-by-4.0", None, "mit"),
    ("base:apache-2.0 teacher:mit data:mit", None, "apache-2.0"),
    ("base:apache-2.0 teacher:mit data:mit", "cc-by-4.0", "cc-by-4.0"),
    ("base:apache-2.0 data:cc-by-sa-4.0", None, "cc-by-sa-4.0"),
    ("base:apache-2.0 data:cc-by-nc-4.0", None, "cc-by-nc-4.0"),
    ("base:apache-2.0 data:cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
    ("base:cc-by-nc-sa-4.0 data:cc-by-nc-4.0", None, "cc-by-nc-sa-4.0"),
    ("base:llama3.1 data:mit", None, "llama3.1"),
    ("base:llama3 data:mit", None, "llama3"),
    ("base:apache-2.0 teacher:llama3.1", None, "llama3.1"),
    ("base:apache-2.0 teacher:llama3", None, ["teacher", "forbids"]),
    ("base:llama3.1 data:cc-by-sa-4.0", None, ["licenses clash", "llama3.1", "cc-by-sa-4.0"]),
    ("base:llama3.1 data:cc-by-nc-4.0", None, ["licenses clash", "non-commercial"]),
    ("base:gemma teacher:llama3.1", None, ["licenses clash"]),
    ("base:cc-by-sa-3.0 data:cc-by-sa-4.0", None, ["licenses clash"]),
    ("base:mit data:cc-by-nd-4.0", None, ["allows no derivatives"]),
    ("base:other data:mit", None, ["base model base: its license is not known", "--license base="]),
    ("base:mit data:?", None, ["data data: its license is not known"]),
    ("base:llama3.1", "mit", ["--license mit", "llama3.1"]),
    ("data:mit", "other", ["--license", "say which"]),
    ("data:cc-by-nc-4.0", "mit", ["--license mit", "non-commercial"]),
]


@pytest.mark.parametrize(("sources", "wanted", "result"), CASES)
def test_cases(sources: str, wanted: str | None, result: str | list[str]) -> None:
    pairs = [part.split(":") for part in sources.split()]
    made_from = [
        LicenseSource(n, ROLES[n], None if license == "?" else license) for n, license in pairs
    ]
    if isinstance(result, str):
        assert settle_license(made_from, wanted) == result
        return
    with pytest.raises(UserError) as refusal:
        settle_license(made_from, wanted)
    for words in result:
        assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
