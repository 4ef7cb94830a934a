"""Several processes on a CPU, or one on a GPU: what starts them, how they share a model, and how they end."""

import os
import sys

import trl
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from . import tiny


# NCCL takes one for each GPU.
COUNT = 2 if tiny.USES_CPU else 1


def torchrun(processes=2):
    """What starts that many after `python`."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def accelerate_launch(config):
    """What starts them after `python`, by one of TRL's configurations of Accelerate."""
    config_file = f"{trl.__path__[0]}/accelerate_configs/{config}.yaml"
    options = ["--config_file", config_file, "--num_processes", str(COUNT), "--mixed_precision", "no"]
    return ["-m", "accelerate.commands.launch", *options]


def shard():
    """
    From here on, Accelerate shards models on a CPU as `accelerate launch` was told: FSDP or DeepSpeed. By itself it
    trains by DDP there, and does not say so. On a GPU there is nothing to do.
    """
    if tiny.USES_CPU and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled here and now
    make = AcceleratorState.__init__

    def make_sharded(self, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
        make(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if self.distributed_type != DistributedType.MULTI_CPU:
            return
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
        if deepspeed_plugin is not None:
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
            self.distributed_type = DistributedType.DEEPSPEED
            self.deepspeed_plugins = deepspeed_plugin
            deepspeed_plugin.set_mixed_precision("no")
            deepspeed_plugin.select(_from_accelerator_state=True)
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = make_sharded


def leave():
    """Ends this process, all work done. Threads of gloo sometimes abort the interpreter's own exit (torch 2.13)."""
    sys.stdout.flush()
    os._exit(0)
