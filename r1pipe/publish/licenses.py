"""Licenses of a model's sources, and which license the model may have.

The table is small and strict: a model counts as derived from its base model, from the teacher whose
samples it learned from, and from its training data. It is no legal advice. Identifiers are the
hub's.
"""

from dataclasses import dataclass
from typing import Literal

from r1pipe.utils.errors import UserError

FREE = frozenset(
    {"mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "bsl-1.0", "ncsa"}
    | {"cc0-1.0", "unlicense", "wtfpl", "pddl", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"}
    | {"odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0", "postgresql", "artistic-2.0"}
)
"""Ask for attribution at most: a derivative may have any license."""

NON_COMMERCIAL = frozenset({"cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"})
"""A derivative may have any license that is for non-commercial use only."""

NON_COMMERCIAL_KEPT = frozenset({"cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"})
"""For non-commercial use only, and a derivative must have the same license."""

NO_DERIVATIVES = frozenset({"cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"})

NO_TEACHING = frozenset({"llama2", "llama3"})
"""Samples of these models may not improve any other model."""

# Every other license (share-alike, copyleft, and the terms of a model's maker, such as llama3.1 or
# gemma) is kept: a derivative must have the same.

UNKNOWN = frozenset(("", "other", "unknown"))
"""What the hub shows for a license that is not one of its identifiers."""

DEFAULT = "apache-2.0"
"""For random weights and data that requires nothing."""


@dataclass(frozen=True)
class LicenseSource:
    """Something that a model was made from."""

    name: str
    """A hub id, a folder, or a data recipe."""
    role: Literal["base model", "teacher", "data"]
    license: str | None
    """None: not known."""


def settle_license(sources: list[LicenseSource], wanted: str | None = None) -> str:
    """The license of something made from `sources`: `wanted` if they allow it, otherwise the one
    that a source insists on, or the base model's.

    Raises UserError in one line for an unknown license, and for two that clash.
    """
    if wanted in UNKNOWN:
        raise UserError(f'--license "{wanted}": say which, by an identifier of the hub')
    for source in sources:
        check_source(source)
    keepers = [source for source in sources if is_kept(source.license)]
    restricted = [source for source in sources if is_non_commercial(source.license)]
    result = choose_license(sources, keepers, restricted)
    if wanted is None or wanted == result:
        return result
    if keepers:
        raise UserError(
            f"--license {wanted}: {describe_license(keepers[0])}, which derivatives must keep: "
            f"leave the option out, or say {result}"
        )
    if restricted and not is_non_commercial(wanted):
        raise UserError(
            f"--license {wanted}: {describe_license(restricted[0])}, non-commercial only"
        )
    return wanted


def check_source(source: LicenseSource) -> None:
    """Raises UserError for a source that rules out publishing."""
    if source.license is None or source.license in UNKNOWN:
        raise UserError(
            f"{source.role} {source.name}: its license is not known; "
            f"add --license {source.name}=IDENTIFIER, or have licenses: in the recipe"
        )
    if source.license in NO_DERIVATIVES:
        raise UserError(f"{describe_license(source)}, which allows no derivatives: not published")
    if source.role == "teacher" and source.license in NO_TEACHING:
        raise UserError(
            f"{describe_license(source)}, which forbids to improve other models with its samples"
        )


def choose_license(
    sources: list[LicenseSource], keepers: list[LicenseSource], restricted: list[LicenseSource]
) -> str:
    """The default. Raises UserError for licenses that clash. `keepers`: sources whose derivatives
    must have the same license; `restricted`: non-commercial ones."""
    for other in keepers[1:]:
        if other.license != keepers[0].license:
            raise UserError(
                f"licenses clash: {describe_license(keepers[0])}, {describe_license(other)}; "
                "each requires derivatives to have its own"
            )
    if keepers and restricted and not is_non_commercial(keepers[0].license):
        raise UserError(
            f"licenses clash: {describe_license(restricted[0])}, for non-commercial use only; "
            f"{describe_license(keepers[0])}, which derivatives must keep and is not"
        )
    if keepers or restricted:
        return (keepers or restricted)[0].license
    return next((s.license for s in sources if s.role == "base model"), DEFAULT)


def is_kept(license: str) -> bool:
    """Whether a derivative must have the same license."""
    return license not in FREE | NON_COMMERCIAL


def is_non_commercial(license: str) -> bool:
    return license in NON_COMMERCIAL | NON_COMMERCIAL_KEPT


def describe_license(source: LicenseSource) -> str:
    return f"{source.role} {source.name} is {source.license}"
