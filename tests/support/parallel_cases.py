"""Trainings run one after another by the processes of one launch: `torchrun parallel_cases.py CASES.json`.

Each case is {"name", "script", "is_sharded", "arguments"}: one of the fine-tuning scripts under DDP, or under FSDP2.
What a process takes from a stream is written beside CASES.json, in `taken-NAME-RANK.txt`: a line `EPOCH INDEX` each.
"""

import contextlib
import json
import os
import runpy
import sys
import warnings
from pathlib import Path

from accelerate import Accelerator, state
from accelerate.utils import DistributedType

from hf_vit.data.augmentation import AugmentedStream


EXAMPLES = Path(__file__).parents[2] / "examples"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
}
ORIGINAL = state.AcceleratorState.__init__
READ = AugmentedStream.__iter__


def offer_fsdp_on_cpu(self, mixed_precision=None, cpu=False, *args, **kwargs):
    """Accelerate keeps FSDP for accelerators; torch's own works over gloo, so processes on the CPU pass as such."""
    if not state.PartialState._shared_state:
        state.PartialState(cpu=True)
    shared = state.PartialState._shared_state
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and shared["distributed_type"] == DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU
    ORIGINAL(self, mixed_precision, cpu, *args, **kwargs)


def note_what_is_taken(file: Path) -> None:
    def read_and_note(stream):
        for sample in READ(stream):
            with file.open("a") as notes:
                notes.write(f"{sample['epoch']} {sample['index']}\n")
            yield sample

    AugmentedStream.__iter__ = read_and_note


def run(case: dict, folder: Path) -> int:
    note_what_is_taken(folder / f"taken-{case['name']}-{os.environ['RANK']}.txt")
    for name, value in FSDP2.items():
        os.environ.pop(name, None)
        if case["is_sharded"]:
            os.environ[name] = value
    state.AcceleratorState._reset_state(reset_partial_state=True)
    main = runpy.run_path(str(EXAMPLES / f"{case['script']}.py"))["main"]
    with contextlib.redirect_stdout(sys.stderr):
        return main(case["arguments"])


if __name__ == "__main__":
    state.AcceleratorState.__init__ = offer_fsdp_on_cpu
    Accelerator.end_training = lambda self: None  # the next case needs the process group
    warnings.simplefilter("ignore")
    file = Path(sys.argv[1])
    for case in json.loads(file.read_text()):
        status = run(case, file.parent)
        if status:
            sys.exit(f"{case['name']} ended with status {status}")
