"""
Finds and loads the model to evaluate, as it was trained: files, fingerprint, adapter, chat template, end tokens.

Both engines get an ordinary checkpoint. An adapter is first merged into its base model, in single precision. Before
anything is sampled, the merged model is compared with the adapter.
"""

import hashlib
import io
import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import create_model_from_path


Prompt = list[dict[str, Any]]

DTYPES = ("float32", "bfloat16", "float16")
# The files of a model in a repository on the Hub.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
# Relative to the largest logit. Rounding in single precision is about 1e-7. Every wrong merge that we tried is above.
MERGE_TOLERANCE = 1e-3


# Files


@dataclass(frozen=True)
class ModelFiles:
    """
    The directories of a model.

    Args:
        name (`str`): The name that the user gave.
        directory (`Path`): Directory of the model or the adapter.
        base (`Path`): Directory with the weights and the configuration. It differs from `directory` for an adapter.
    """

    name: str
    directory: Path
    base: Path

    @property
    def is_adapter(self) -> bool:
        return self.directory != self.base

    @property
    def tokenizer(self) -> Path:
        """The trainer saves the tokenizer beside an adapter. If it is missing, the base model's tokenizer was used."""
        return self.directory if (self.directory / "tokenizer_config.json").exists() else self.base


def find_model(name: str) -> ModelFiles:
    """
    Finds a model, or an adapter and its base model, on the disk or on the Hub.

    Raises:
        `ValueError`: the model does not exist, or an adapter does not name its base model.
    """
    directory = _directory(name)
    adapter = _adapter_config(directory)
    if adapter is None:
        if not (directory / "config.json").exists():
            raise ValueError(
                f"'{name}' contains no model: neither `config.json` nor `adapter_config.json`."
                + (" Pass `--checkpoints` for its checkpoints." if list(directory.glob("checkpoint-*")) else "")
            )
        return ModelFiles(name, directory, directory)
    base_name = adapter.get("base_model_name_or_path")
    if not base_name:
        raise ValueError(f"'{name}' is an adapter, but its `adapter_config.json` has no `base_model_name_or_path`.")
    try:
        base = _directory(base_name)
    except ValueError as error:
        raise ValueError(f"The base model of the adapter '{name}' was not found: {error}") from error
    if not (base / "config.json").exists():
        raise ValueError(f"The base model of the adapter '{name}', '{base_name}', contains no `config.json`.")
    return ModelFiles(name, directory, base)


def _directory(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        directory = Path(snapshot_download(name, allow_patterns=MODEL_FILES))
        if not list(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(name, allow_patterns=[*MODEL_FILES, "*.bin"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"'{name}' is not a directory and cannot be loaded from the Hub: {error}") from error
    return directory


def _adapter_config(directory: Path) -> dict[str, Any] | None:
    path = directory / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def fingerprint(files: ModelFiles) -> dict[str, str]:
    """
    Hashes of all files that affect a completion, by kind. Files are read completely: their sizes and times are not
    enough, because a training run repeatedly writes weights of the same size.
    """
    parts = {
        "weights": _weights(files.base),
        "configuration": [files.base / "config.json"],
        "tokenizer": _tokenizer_files(files.tokenizer),
        "code": files.base.glob("*.py"),
    }
    if files.is_adapter:
        parts["adapter"] = [files.directory / "adapter_config.json", *_weights(files.directory)]
    return {part: _hash_of(paths) for part, paths in parts.items()}


def _weights(directory: Path) -> list[Path]:
    return _matching(directory, "*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def _tokenizer_files(directory: Path) -> list[Path]:
    """
    Finds the files by the names that transformers gives them: a run or its evaluation may write other files into the
    directory. A tokenizer in files of other names is recognized by its tokens, see [`trl_a3po.evaluation.runs`].
    """
    return _matching(
        directory,
        *("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json"),
        *("chat_template*", "additional_chat_templates/*", "processor_config.json", "preprocessor_config.json"),
    )


def _matching(directory: Path, *patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def _hash_of(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


# The chat template and the tokens of the training


def trained_chat_template_kwargs(files: ModelFiles) -> dict[str, Any] | None:
    """
    `chat_template_kwargs` of the run that trained the model, from `training_args.bin` beside it. None if the file is
    missing or not from a GRPO run. No code in the file is run.
    """
    path = files.directory / "training_args.bin"
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            values = vars(_InertUnpickler(io.BytesIO(archive.read(name))).load())
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, pickle.UnpicklingError):
        return None
    if "chat_template_kwargs" not in values:
        return None
    found = values["chat_template_kwargs"] or {}
    return found if isinstance(found, dict) else None


class _Inert:
    """Replaces every object that a pickle asks for. It accepts all arguments and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return None


@dataclass(frozen=True)
class Chat:
    """
    Converts prompts to tokens, and tokens to text, as in training.

    Args:
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`): As the trainer saved it.
        end_ids (`tuple[int, ...]`): Tokens that end a completion: those of the tokenizer and of the model.
        suppressed_ids (`tuple[int, ...]`): Tokens that stand for images, which training never samples.
        context (`int`, *optional*): Maximum tokens of a prompt with its completion; None if the model has no limit.
        template_kwargs (`dict`): Passed to the chat template.
    """

    processor: PreTrainedTokenizerBase | ProcessorMixin
    end_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...]
    context: int | None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "Chat":
        tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        declared = generation_config.eos_token_id if generation_config is not None else None
        ids = [tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])]
        image = getattr(config, "image_token_id", None) if isinstance(processor, ProcessorMixin) else None
        return cls(
            processor=processor,
            end_ids=tuple(sorted({each for each in ids if each is not None})),
            suppressed_ids=() if image is None else (image,),
            context=getattr(config.get_text_config(), "max_position_embeddings", None),
            template_kwargs=template_kwargs or {},
        )

    @property
    def is_multimodal(self) -> bool:
        return isinstance(self.processor, ProcessorMixin)

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a conversation up to the start of the completion."""
        if self.is_multimodal:
            prompt = prepare_multimodal_messages(prompt, images=[])
        encoded: Any = self.processor.apply_chat_template(
            [prompt], add_generation_prompt=True, tokenize=True, return_dict=True, **self.template_kwargs
        )
        return [int(token) for token in encoded["input_ids"][0]]

    def decode(self, ids: list[int]) -> str:
        return cast(str, self.processor.decode(ids, skip_special_tokens=True))


def load_chat(
    files: ModelFiles, template_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> Chat:
    """
    Loads the tokenizer or processor of a model, and the settings of its chat template.

    Raises:
        `ValueError`: the tokenizer has no chat template, or the template does not read one of `template_kwargs`.
    """
    config = load_config(files, trust_remote_code)
    directory = files.tokenizer
    # If there is only a tokenizer, the model was trained on text only.
    has_processor = any((directory / f"{name}_config.json").exists() for name in ("processor", "preprocessor"))
    kind = AutoProcessor if has_processor else AutoTokenizer
    options = {"config": config} if has_processor and files.is_adapter else {}
    processor = kind.from_pretrained(str(directory), trust_remote_code=trust_remote_code, **options)
    try:
        generation_config = GenerationConfig.from_pretrained(str(files.base))
    except OSError:
        generation_config = GenerationConfig.from_model_config(config)
    template = processor.chat_template
    if not template:
        raise ValueError(
            f"The tokenizer of '{files.name}' has no chat template. Save one as `chat_template.jinja` in its "
            "directory."
        )
    unread = [name for name in template_kwargs or {} if name not in str(template)]
    if unread:
        raise ValueError(f"`chat_template_kwargs`: the chat template of '{files.name}' ignores {', '.join(unread)}.")
    return Chat.of(processor, config, generation_config, template_kwargs)


def load_config(files: ModelFiles, trust_remote_code: bool = False) -> PretrainedConfig:
    return AutoConfig.from_pretrained(str(files.base), trust_remote_code=trust_remote_code)


def resolve_dtype(dtype: str, config: PretrainedConfig) -> str:
    """
    The data type for both engines. `"auto"` is the data type in the configuration. vLLM's own `"auto"` would turn
    single precision into half precision.
    """
    if dtype != "auto":
        return dtype
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or "float32"
    name = str(found).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"The model's data type {name} is not supported. Set `dtype` to one of {', '.join(DTYPES)}.")
    return name


# Weights


def load_model(directory: Path, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads the model as TRL does for training, with the class that its configuration names."""
    return create_model_from_path(str(directory), dtype=dtype, trust_remote_code=trust_remote_code)


def load_adapted_model(files: ModelFiles, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a model with an adapter that cannot be merged into it, such as prompt tuning."""
    from peft import PeftModel

    model = load_model(files.base, dtype, trust_remote_code)
    return PeftModel.from_pretrained(model, str(files.directory)).eval()  # type: ignore[return-value]


def can_be_merged(files: ModelFiles) -> bool:
    from peft import PeftConfig

    return not PeftConfig.from_pretrained(str(files.directory)).is_prompt_learning


@contextmanager
def ordinary_checkpoint(
    files: ModelFiles, dtype: str, scratch: Path, trust_remote_code: bool = False
) -> Iterator[Path]:
    """
    The directory of an ordinary checkpoint. For an adapter, it is a temporary directory with the adapter merged into
    its base model; otherwise it is the model's own directory.

    Args:
        files (`ModelFiles`): The model.
        dtype (`str`): Data type of the merged model.
        scratch (`Path`): The temporary directory. Files of an interrupted evaluation there are removed.
        trust_remote_code (`bool`): Whether to run code from the model's repository.

    Raises:
        `ValueError`: merging changes the output of the model.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    if not files.is_adapter:
        yield files.base
        return
    try:
        model = _merged(files, trust_remote_code).to(getattr(torch, dtype))
        model.generation_config = GenerationConfig()  # the samplers read none
        model.save_pretrained(scratch)
        for path in (*files.base.glob("*.py"), *_tokenizer_files(files.tokenizer)):
            shutil.copy(path, scratch)
        del model
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _merged(files: ModelFiles, trust_remote_code: bool) -> PreTrainedModel:
    from peft import PeftConfig, PeftModel

    model = create_model_from_path(
        str(files.base), dtype="float32", device_map=None, trust_remote_code=trust_remote_code
    )
    adapter = PeftConfig.from_pretrained(str(files.directory))
    if not _relies_on_tied_weights(adapter):
        _untie(model)
    with warnings.catch_warnings():
        # PEFT warns about merging into tied embeddings. They were just untied.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        adapted = PeftModel.from_pretrained(model, str(files.directory)).eval()
        expected = _some_logits(adapted, model.config)
        try:
            merged = adapted.merge_and_unload()
        except (NotImplementedError, ValueError, AttributeError) as error:
            raise ValueError(
                f"The adapter '{files.name}' ({adapter.peft_type}) cannot be merged into its base model: {error}"
            ) from error
    computed = _some_logits(merged, model.config)
    difference = ((computed - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    if not difference < MERGE_TOLERANCE:
        raise ValueError(
            f"The adapter '{files.name}' ({adapter.peft_type}) gives other logits after it is merged into its base "
            f"model: they differ by {difference:.1e} of the largest. It cannot be evaluated."
        )
    return merged


def _relies_on_tied_weights(adapter: Any) -> bool:
    return bool(getattr(adapter, "ensure_weight_tying", None) or getattr(adapter, "trainable_token_indices", None))


def _untie(model: PreTrainedModel) -> None:
    """Unties embeddings and output: an adapter of one does not adapt the other, although they share their weight."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or output.weight is not embeddings.weight:
        return
    output.weight = torch.nn.Parameter(embeddings.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _some_logits(model: torch.nn.Module, config: PretrainedConfig) -> torch.Tensor:
    """(1, tokens, vocabulary) logits for a few tokens from the whole vocabulary."""
    ids = torch.linspace(0, config.get_text_config().vocab_size - 1, steps=16).long()[None]
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
