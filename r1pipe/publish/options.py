"""What the command line asks of `r1pipe publish`."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Options:
    target: Path
    repo_id: str
    public: bool = False
    dry_run: bool = False
    force: bool = False
    max_overlap: float = 0.0
    licenses: dict[str, str] = field(default_factory=dict)
    """By source; the model's own under ""."""
    base_models: dict[str, str] = field(default_factory=dict)
    """Hub ids by the folders that the recipe names."""
    rollouts: bool = False
    gguf: str | None = None
    """F32, F16 or Q8_0; None: no such file."""
    adapter: bool = False
    """The adapter alone, beside the base model's name."""
    collection: str | None = None
