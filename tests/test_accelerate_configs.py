"""The configuration files of `examples/accelerate`, as accelerate's own loader and launcher read them."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import ComputeEnvironment, DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from ballad_hf.training.step import TrainableTowers


ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "accelerate"

# file -> type, machines, processes of all machines, precision, on the CPU
EXPECTED = {
    "cpu": (DistributedType.NO, 1, 1, "no", True),
    "one_gpu": (DistributedType.NO, 1, 1, "bf16", False),
    "multi_gpu": (DistributedType.MULTI_GPU, 1, 8, "bf16", False),
    "two_machines": (DistributedType.MULTI_GPU, 2, 16, "bf16", False),
    "fsdp": (DistributedType.FSDP, 1, 8, "bf16", False),
}


def commands_in(file: Path) -> list[list[str]]:
    """The `accelerate launch` commands that the comment gives, without the program's name and its placeholders."""
    comment = "".join(
        line.removeprefix("#").rstrip().removesuffix("\\") + ("" if line.rstrip().endswith("\\") else "\n")
        for line in file.read_text().splitlines()
        if line.startswith("#")
    )
    found = re.findall(r"^\s*accelerate launch (.*?)(?: \.\.\.)?$", comment, re.MULTILINE)
    return [shlex.split(command.replace("ADDRESS", "10.0.0.1")) for command in found]


def launched(name: str):
    """The launcher's arguments for the command in a file's comment, after it has read the file."""
    (command,) = commands_in(CONFIGS / f"{name}.yaml")
    assert command[:2] == ["--config_file", f"examples/accelerate/{name}.yaml"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert isinstance(defaults, ClusterConfig)
    return arguments


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Commands name files from here; nothing that a launcher left in the environment counts."""
    monkeypatch.chdir(ROOT)
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def test_every_file_is_expected():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_loader_reads_every_value(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kind, machines, processes, precision, on_cpu = EXPECTED[name]
    assert config.compute_environment == ComputeEnvironment.LOCAL_MACHINE
    assert config.distributed_type == kind
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.mixed_precision == precision
    assert config.use_cpu is on_cpu
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert set(written) <= set(ClusterConfig.__dataclass_fields__)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_command_of_the_comment_starts_the_script(name):
    arguments = launched(name)
    assert arguments.training_script == "examples/train_ballad.py"
    assert (ROOT / arguments.training_script).is_file()
    kind, machines, processes, precision, _ = EXPECTED[name]
    assert (arguments.num_machines, arguments.num_processes) == (machines, processes)
    assert arguments.mixed_precision == precision
    assert (arguments.multi_gpu, arguments.use_fsdp) == (
        kind == DistributedType.MULTI_GPU,
        kind == DistributedType.FSDP,
    )


@pytest.mark.parametrize(("name", "on_cpu"), [("cpu", "True"), ("one_gpu", "False")])
def test_one_process_is_started_as_it_is(name, on_cpu):
    command, environment = prepare_simple_launcher_cmd_env(launched(name))
    assert command[1:] == ["examples/train_ballad.py"]
    assert environment["ACCELERATE_USE_CPU"] == on_cpu
    assert environment["ACCELERATE_MIXED_PRECISION"] == EXPECTED[name][3]


def test_several_devices_of_one_machine():
    arguments = launched("multi_gpu")
    environment = prepare_multi_gpu_env(arguments)
    assert arguments.nproc_per_node == "8"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "ACCELERATE_USE_FSDP" not in environment
    assert "CUDA_VISIBLE_DEVICES" not in environment  # all of them


def test_two_machines_meet_at_the_first_ones_address(monkeypatch):
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    arguments = launched("two_machines")
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 0)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")


def test_fsdp_shards_every_layer_of_both_towers(monkeypatch, tiny_clip):
    for name, value in prepare_multi_gpu_env(launched("fsdp")).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert "FULL" in str(plugin.state_dict_type)
    towers = TrainableTowers(tiny_clip.clip)
    wrapped = fsdp2_prepare_auto_wrap_policy(plugin, towers)
    names = {name for name, module in towers.named_modules() if wrapped(module)}
    assert names == {"clip.text_model.encoder.layers.0", "clip.vision_model.encoder.layers.0"}
