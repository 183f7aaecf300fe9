"""How a run computes: number formats, memory layout, and what is compiled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipelines.keys import ON_OFF
from engine.config.sections import Section


class PrecisionConfig(Section):
    """Number formats and memory layout."""

    amp: Literal["float32", "bf16", "fp16"] = Field(
        "float32", description="autocast of the networks; losses stay float32"
    )
    tf32: bool = Field(True, description="TF32 in float32 matrix products and convolutions on GPUs that have it")
    channels_last: Annotated[Literal["auto", "on", "off"], ON_OFF] = Field(
        "auto",
        description="channels-last memory for images and networks; auto: but, on a CPU, for convolutions of more than "
        "two weights for each number of the maps that they go through, such as wide ones on few rows or small maps",
    )
    compile: bool = Field(
        False,
        description="torch.compile the networks, and the method's objective where that is one graph; what cannot be "
        "compiled is said and stays as it is",
    )
    graphs: Annotated[Literal["off", "on"], ON_OFF] = Field(
        "off",
        description="on: the update of a step (forward of all peers, objective, backward, optimisers) is captured as "
        "one CUDA graph and launched at once; not yet tried on a GPU",
    )
