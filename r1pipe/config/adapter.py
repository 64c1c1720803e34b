"""What is trained in place of all weights."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from r1pipe.config.strict import Strict


class Adapter(Strict):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): the checkpoint's weights stay as they are; beside
    each target matrix the product of two small ones is trained, B A times `alpha` / `r`."""

    r: PositiveInt = 16
    """Rank: rows of A, columns of B."""
    alpha: PositiveInt = 32
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of linear layers, such as q_proj, and of experts' fused matrices, such as gate_up_proj.
    Default: all of them in the model but head and routers."""
    sync: Literal["merged", "alone"] = "merged"
    """What the sampler gets after an update; alone if vLLM takes it and agrees in a probe."""
    offload_base: bool = False
    """The frozen weights leave the GPU while the engine samples: in one process, where it sleeps
    during the update."""
