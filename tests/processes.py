"""FSDP and DeepSpeed without an accelerator. Told to shard on a CPU, Accelerate trains by DDP, and does not say so."""

import os

import trl
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def launcher(config):
    """What starts two processes after `python`, by one of TRL's configurations of Accelerate."""
    config_file = f"{trl.__path__[0]}/accelerate_configs/{config}.yaml"
    options = ["--config_file", config_file, "--num_processes", "2", "--mixed_precision", "no"]
    return ["-m", "accelerate.commands.launch", *options]


def shard():
    """From here on, Accelerate does on a CPU what `accelerate launch` was told."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    make = AcceleratorState.__init__

    def make_sharded(self, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
        make(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if self.distributed_type != DistributedType.MULTI_CPU:
            return
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
        if deepspeed_plugin is not None:
            init_deepspeed()
            self.distributed_type = DistributedType.DEEPSPEED
            self.deepspeed_plugins = deepspeed_plugin
            (plugin,) = deepspeed_plugin.values() if isinstance(deepspeed_plugin, dict) else [deepspeed_plugin]
            plugin.set_mixed_precision("no")
            plugin.select(_from_accelerator_state=True)
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = make_sharded


def init_deepspeed():
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled here and now
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
