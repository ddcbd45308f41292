"""What one process of the benchmark is told to do, and what it says: JSON in lines, through pipes."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

DENSE, OURS = "16 bit", "nunchaku-py"
# What a process does: say what is there; write a checkpoint; hold a model and take turns; time what is beside it.
PROBE, WRITE, MEASURE, BESIDE = "probe", "write", "measure", "beside"
STEPS = "num_inference_steps"  # what pipelines call them
TURN = "turn"  # what a measuring process is asked for, until there is no more to read


@dataclass(frozen=True)
class Job:
    """`kind`: DENSE, OURS, or the label of a peer. config: of the denoiser, with `_class_name`.

    pipeline: the folder whose images are measured, with the denoiser's name in it, or "": one step is. denoiser: the
    folder to load it from, or "": made with random weights. share: blocks of one kind are the same tensors. format,
    rules: of random weights in 4 bit, as `quantize` takes them.
    call: the pipeline's arguments. threads: 0 for as many as PyTorch takes.
    """

    task: str
    kind: str
    name: str
    config: dict[str, Any]
    width: int
    height: int
    device: str
    threads: int
    mode: str = "auto"
    text: int = 0
    batch: int = 1
    calls: int = 1
    pipeline: str = ""
    component: str = ""
    denoiser: str = ""
    share: bool = False
    format: str = "int4"
    rules: dict[str, str] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    write_to: str = ""
    verbose: bool = False

    def line(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(line: str) -> Job:
        return Job(**json.loads(line))
