"""Phase A with towers that FSDP shards over two processes: the weights are those of one process.

accelerate shards on accelerators only. On a CPU its state is told that it does; everything after that is its own code
and torch's, over gloo.
"""

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from ballad_hf.training.phase_a import PhaseALoop

from .test_phase_a_processes import flat, launch, read, run


pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def _the_last_is_the_best(monkeypatch):
    """Images of noise teach nothing, and the start would be kept: what is compared must have been trained."""
    monkeypatch.setattr(PhaseALoop, "_score", lambda self, figures: self.state.step)


def sharding_accelerator(version=2):
    """What `examples/accelerate/fsdp.yaml` says, but for bfloat16."""
    accelerator = Accelerator(cpu=True)
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["CLIPEncoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    state.fsdp_plugin.fsdp_version = version
    state.distributed_type = DistributedType.FSDP
    return accelerator


def run_sharded(folder, file, options, resume=None, stop_after=None):
    """`run`, after every weight was found to be a shard; it ends before the step `stop_after`, as a fault would."""
    whole = PhaseALoop.train

    def checked(self):
        assert all(isinstance(parameter, DTensor) for parameter in self.setup.towers.parameters())
        assert self.setup.clip.visual_projection.weight.to_local().shape[0] == 8  # of 16
        whole(self)

    PhaseALoop.train = checked
    step = PhaseALoop._train_step

    def stops(self, batch):
        if self.state.step == stop_after:
            raise RuntimeError("stopped")
        return step(self, batch)

    PhaseALoop._train_step = stops
    try:
        run(folder, file, options, resume, accelerator=sharding_accelerator())
    except RuntimeError as error:
        if stop_after is None or str(error) != "stopped":
            raise


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "contrastive", "optimizer": "adamw", "ema_decay": 0.9, "max_grad_norm": 0.1},
        {"loss": "class_prompt", "micro_batch_size": 1, "momentum": 0.9, "activation_checkpointing": True},
        {"loss": "lade", "train": "image", "tail_guard": "interpolate"},
        {"train": "projections", "logit_scale": 10.0},
    ],
    ids=lambda options: options.get("train", options.get("loss")),
)
def test_shards_train_to_the_weights_of_one_process(tmp_path, options):
    launch(1, None, tmp_path / "start", {**options, "epochs": 0})
    launch(1, None, tmp_path / "one", {"learning_rate": 1e-3, **options})
    debug_launcher(run_sharded, args=(None, tmp_path / "two", {"learning_rate": 1e-3, **options}), num_processes=2)
    start, one, two = (read(tmp_path / name) for name in ("start", "one", "two"))
    assert not torch.allclose(flat(one["weights"]), flat(start["weights"]), rtol=0, atol=1e-4)
    assert one["steps"] == two["steps"] == 8
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        known = {name: value for name, value in mine.items() if value is not None}
        assert {name: theirs[name] for name in known} == pytest.approx(known, rel=1e-4)
    assert two["weights"]["clip.logit_scale"].shape == ()  # as it was before
    # SGD passes the rounding of a gradient on as it is, AdamW enlarges it where the gradient is almost zero.
    tolerance = 1e-4 if options.get("optimizer") == "adamw" else 1e-5
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-5, atol=tolerance, msg=name)


@pytest.mark.slow
def test_sharded_and_resumed_is_bit_for_bit_what_never_stopped(tmp_path):
    options = {"optimizer": "adamw", "ema_decay": 0.9, "checkpoint_every_steps": 3}
    debug_launcher(run_sharded, args=(None, tmp_path / "whole", dict(options)), num_processes=2)
    arguments = (tmp_path / "run", tmp_path / "resumed", dict(options), True, 5)
    debug_launcher(run_sharded, args=arguments, num_processes=2)
    assert not (tmp_path / "resumed").exists()
    debug_launcher(run_sharded, args=arguments[:-1], num_processes=2)
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "resumed")
    assert resumed["history"] == whole["history"]
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())


@pytest.mark.parametrize(
    ("options", "version", "message"),
    [
        ({"lora_rank": 2}, 2, "lora_rank is 2.*lora_rank=0"),
        ({"torch_compile": True}, 2, "torch_compile.*not.*sharded"),
        ({}, 1, "fsdp_version: 2"),
    ],
    ids=["lora", "compile", "version-1"],
)
def test_what_shards_cannot_do_is_refused(options, version, message):
    with pytest.raises(ValueError, match=message):
        run(None, None, options, accelerator=sharding_accelerator(version))
