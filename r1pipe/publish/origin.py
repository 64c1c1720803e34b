"""What a published model was made from: base model, teachers, training data, and its license."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from r1pipe.data.problems import read_constants
from r1pipe.publish.candidate import Candidate
from r1pipe.publish.hub import Hub
from r1pipe.publish.licenses import LicenseSource, settle_license
from r1pipe.publish.options import Options
from r1pipe.runs.reader import StageFolder


@dataclass(frozen=True)
class TrainingData:
    """One data recipe of a stage, as the card shows it."""

    stage: StageFolder
    name: str
    """The recipe's, or the path of the rows that it was given."""
    split: str
    hub_id: str | None
    license: str | None
    """From the recipe; None: not stated."""


@dataclass(frozen=True)
class Origin:
    base_hub_id: str | None
    """The base model's; None: random weights, or a folder whose hub id is not known."""
    data: list[TrainingData]
    sources: list[LicenseSource]
    license: str
    """The published model's own."""

    @classmethod
    def find(cls, candidate: Candidate, options: Options, hub: Hub) -> "Origin":
        """Raises UserError for a license that is not known, and for licenses that clash."""
        data = list(list_data(candidate.lineage))
        sources = list_sources(candidate, data, options, hub)
        license = settle_license(sources, options.licenses.get(""))
        return cls(find_hub_id(candidate.base_model, options), data, sources, license)


def list_data(lineage: list[StageFolder]) -> Iterator[TrainingData]:
    """The data recipes of these stages."""
    for stage in lineage:
        for source in stage.section.problem_sets():
            if source.recipe is None:
                continue
            constants = read_constants(source.recipe)
            name, hub_id = source.recipe, constants.get("HUB_ID")
            path = source.options.get("path")
            elsewhere = path is not None and not Path(path).expanduser().exists()
            if path is not None and (hub_id is None or (elsewhere and path != hub_id)):
                # Another dataset's rows: the recipe only knows how to read them.
                name, hub_id, constants = path, path if elsewhere else None, {}
            yield TrainingData(stage, name, source.split, hub_id, constants.get("LICENSE"))


def list_sources(
    candidate: Candidate, data: list[TrainingData], options: Options, hub: Hub
) -> list[LicenseSource]:
    """Models and data that the model was made from. Licenses come from the command line, the
    recipe, or the source's own card; None where none of them says."""
    given = {**(candidate.stage.config.get("licenses") or {}), **options.licenses}
    models = {}
    if candidate.base_model is not None:
        models[candidate.base_model] = "base model"
    for stage in candidate.lineage:
        for name in stage.section.models():
            if (root := candidate.run.base_model(name)) is not None:
                models.setdefault(root, "teacher")
        if endpoint := getattr(stage.section, "teacher", None):
            models.setdefault(endpoint.model, "teacher")
    sources = [
        LicenseSource(name, role, given.get(name) or find_model_license(name, options, hub))
        for name, role in models.items()
    ]
    for item in {d.name: d for d in data}.values():
        license = given.get(item.name) or item.license
        if license is None and item.hub_id:
            license = hub.find_license(item.hub_id, "dataset")
        sources.append(LicenseSource(item.name, "data", license))
    return sources


def find_model_license(name: str, options: Options, hub: Hub) -> str | None:
    """From the card in a base model's folder, or the card of its repository."""
    card = Path(name).expanduser() / "README.md"
    if card.is_file():
        return ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    hub_id = find_hub_id(name, options)
    return hub.find_license(hub_id, "model") if hub_id else None


def find_hub_id(name: str | None, options: Options) -> str | None:
    """The hub id of a base model that the recipe names by its hub id or its folder."""
    if name is None or name in options.base_models:
        return options.base_models.get(name)
    return None if Path(name).expanduser().exists() else name
