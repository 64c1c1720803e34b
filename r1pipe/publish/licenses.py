"""Licences: what a model was made from asks for, and which licence a derivative may carry.

The table is small and errs on the strict side: it takes a model to be derived from its base model,
from the model whose samples taught it, and from its training data. It is no legal advice: what it
refuses is what nobody should publish without having asked. Identifiers are the hub's.
"""

from dataclasses import dataclass
from typing import Literal

from r1pipe.utils.errors import UserError

FREE = frozenset(
    {"mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "bsl-1.0", "ncsa"}
    | {"cc0-1.0", "unlicense", "wtfpl", "pddl", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"}
    | {"odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0", "postgresql", "artistic-2.0"}
)
"""Ask for attribution at most: a derivative may carry any licence."""

NON_COMMERCIAL = frozenset({"cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"})
"""A derivative may carry any licence that is for non-commercial use only."""

NON_COMMERCIAL_KEPT = frozenset({"cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"})
"""For non-commercial use only, and a derivative must carry the same licence."""

NO_DERIVATIVES = frozenset({"cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"})

NO_TEACHING = frozenset({"llama2", "llama3"})
"""Samples of these models may not improve any other model."""

# Every other licence (share-alike, copyleft, and the terms of a model's maker, such as llama3.1 or
# gemma) is kept: a derivative must carry the same.

UNKNOWN = frozenset(("", "other", "unknown"))
"""What the hub shows where a licence is not one of its identifiers."""

DEFAULT = "apache-2.0"
"""Of a model from random weights, trained on data that binds it to nothing."""


@dataclass(frozen=True)
class LicenseSource:
    """Something that a model was made from."""

    name: str
    """A hub id, a folder, or a data recipe."""
    role: Literal["base model", "teacher", "data"]
    licence: str | None
    """None: not known."""


def settle_licence(sources: list[LicenseSource], wanted: str | None = None) -> str:
    """The licence that something made from `sources` may carry: `wanted` if that is possible,
    otherwise the base model's or the one that a source insists on.

    Raises UserError in one line for an unknown licence, and for two that cannot be met together.
    """
    if wanted in UNKNOWN:
        raise UserError(f'--license "{wanted}": say which, by an identifier of the hub')
    for source in sources:
        if source.licence is None or source.licence in UNKNOWN:
            raise UserError(
                f"{source.role} {source.name}: its licence is not known; "
                f"add --license {source.name}=IDENTIFIER, or have licenses: in the recipe"
            )
        if source.licence in NO_DERIVATIVES:
            raise UserError(
                f"{describe_license(source)}, which allows no derivatives: not published"
            )
        if source.role == "teacher" and source.licence in NO_TEACHING:
            raise UserError(
                f"{describe_license(source)}, which forbids to improve other models with its "
                "samples"
            )
    keepers = [source for source in sources if is_kept(source.licence)]
    for other in keepers[1:]:
        if other.licence != keepers[0].licence:
            raise UserError(
                f"licences clash: {describe_license(keepers[0])}, {describe_license(other)}; "
                "each asks that what is made from it carries its own"
            )
    restricted = [source for source in sources if is_non_commercial(source.licence)]
    if keepers:
        result = keepers[0].licence
        if restricted and not is_non_commercial(result):
            raise UserError(
                f"licences clash: {describe_license(restricted[0])}, for non-commercial use only; "
                f"{describe_license(keepers[0])}, which asks to be carried on and is not"
            )
    elif restricted:
        result = restricted[0].licence
    else:
        result = next((s.licence for s in sources if s.role == "base model"), DEFAULT)
    if wanted is None or wanted == result:
        return result
    if keepers:
        raise UserError(
            f"--license {wanted}: {describe_license(keepers[0])}, which asks to be carried on: "
            f"leave the option out, or say {result}"
        )
    if restricted and not is_non_commercial(wanted):
        raise UserError(
            f"--license {wanted}: {describe_license(restricted[0])}, non-commercial only"
        )
    return wanted


def is_kept(licence: str) -> bool:
    """Whether a derivative must carry this very licence."""
    return licence not in FREE | NON_COMMERCIAL


def is_non_commercial(licence: str) -> bool:
    return licence in NON_COMMERCIAL | NON_COMMERCIAL_KEPT


def describe_license(source: LicenseSource) -> str:
    return f"{source.role} {source.name} is {source.licence}"
