"""The launch configurations: Accelerate reads each, and launches the loop by those that a CPU can run."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = {
    "cpu": ("NO", 1, 1),
    "ddp_cpu": ("MULTI_GPU", 2, 1),
    "ddp_gpus": ("MULTI_GPU", 8, 1),
    "fsdp2": ("FSDP", 8, 1),
    "several_nodes": ("MULTI_GPU", 16, 2),
}


def test_every_file_is_in_the_table():
    assert {path.stem for path in (EXAMPLES / "accelerate_configs").glob("*")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_takes_every_field_of_a_configuration(name):
    kind, processes, machines = CONFIGS[name]
    config = load_config_from_file(str(EXAMPLES / "accelerate_configs" / f"{name}.yaml"))  # refuses unknown fields
    assert (str(config.distributed_type.value), config.num_processes) == (kind, processes)
    assert config.num_machines == machines
    assert config.use_cpu == (name == "cpu")


def test_the_sharded_configuration_becomes_fsdp2_by_blocks():
    file = EXAMPLES / "accelerate_configs" / "fsdp2.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.use_fsdp
    assert int(args.fsdp_version) == 2
    assert args.fsdp_transformer_layer_cls_to_wrap == "Block"
    assert args.fsdp_state_dict_type == "FULL_STATE_DICT"


@pytest.mark.slow
def test_two_processes_on_the_cpu_are_launched_by_their_configuration(tmp_path):
    model = EXAMPLES / "checkpoints" / "vit-mnist.npz"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]
    launcher.append(f"--config_file={EXAMPLES / 'accelerate_configs' / 'ddp_cpu.yaml'}")
    script = [str(EXAMPLES / "finetune_accelerate.py"), f"--model_name_or_path={model}", "--dataset=digits"]
    arguments = ["--max_steps=2", "--eval_strategy=no", "--save_strategy=no", "--dataloader_num_workers=0"]
    arguments += ["--dataloader_persistent_workers=false", f"--output_dir={tmp_path / 'out'}", "--use_cpu=true"]
    finished = subprocess.run([*launcher, *script, *arguments], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "| processes | 2 |" in (tmp_path / "out" / "README.md").read_text()
