"""`trl-a3po train` in this process, where an engine of vLLM's CPU build takes the weights of every step."""

import sys
from pathlib import Path


# Before vLLM and torch are imported.
sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support import vllm_on_cpu

from trl_a3po.cli.train import train


if __name__ == "__main__":
    with vllm_on_cpu.engines():
        train(sys.argv[1:])
