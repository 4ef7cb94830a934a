"""
Finds and loads the model to evaluate, as it was trained: files, fingerprint, adapter, chat template, end tokens.

Both engines get an ordinary checkpoint. An adapter is first merged into its base model, in single precision. Before
anything is sampled, the merged model is compared with the adapter.
"""

import hashlib
import io
import json
import logging
import pickle
import re
import shutil
import tempfile
import textwrap
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
import trl
from huggingface_hub import snapshot_download
from packaging.version import Version
from safetensors import safe_open
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
from trl.chat_template_utils import parse_response
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import create_model_from_path

from .files import hash_of_file


Prompt = list[dict[str, Any]]

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
# The files of a model in a repository on the Hub, and of its training.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "training_args.bin"]
# The attributes of a tokenizer by which TRL parses completions.
_PARSES_BY = ["response_schema"] if Version(transformers.__version__) >= Version("5.0.0") else []
if Version(trl.__version__) >= Version("1.8.0"):
    _PARSES_BY.append("response_template")
# The file in a temporary directory that holds its name. Only directories with it are ever deleted.
TEMPORARY = "temporary"
# Relative to the largest logit. Rounding in single precision is about 1e-7. Every wrong merge that we tried is above.
MERGE_TOLERANCE = 1e-3


@contextmanager
def loading(what: str) -> Iterator[None]:
    """
    Turns an error in files of a model into one line. Libraries raise errors of many types about such files, with
    messages of many lines.

    Raises:
        `ValueError`: `what` cannot be loaded.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"Cannot load {what}: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return textwrap.shorten(f"{kind}{error}", 500, placeholder=" ...")


# Files


@dataclass(frozen=True)
class ModelFiles:
    """
    The directories of a model.

    Args:
        name (`str`): The name that the user gave.
        directory (`Path`): Directory of the model or the adapter.
        base (`Path`): Directory with the weights and the configuration. It differs from `directory` for an adapter.
        base_revision (`str`, *optional*): Revision on the Hub of an adapter's base model, if its training chose one.
    """

    name: str
    directory: Path
    base: Path
    base_revision: str | None = None

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
        `ValueError`: the model or its base model does not exist, or has no weights.
    """
    directory = _directory(name)
    path = directory / "adapter_config.json"
    if not path.exists():
        if not (directory / "config.json").exists():
            checkpoints = list(directory.glob("checkpoint-*"))
            # PEFT saves an adapter that is not called "default" in a directory of its name.
            adapters = [each.parent for each in directory.glob("*/adapter_config.json")]
            named = ", ".join(f"'{each}'" for each in sorted(set(adapters) - set(checkpoints)))
            raise ValueError(
                f"'{name}' contains no model: neither `config.json` nor `adapter_config.json`."
                + (f" It contains adapters. Pass one of them: {named}." if named else "")
                + (" Pass `--checkpoints` for its checkpoints." if checkpoints else "")
            )
        _require_weights(name, directory)
        return ModelFiles(name, directory, directory)
    if not _matching(directory, "adapter_model.safetensors", "adapter_model.bin"):
        raise ValueError(
            f"'{name}' is an adapter without weights: neither `adapter_model.safetensors` nor `adapter_model.bin`."
        )
    with loading(f"the adapter '{name}'"):
        adapter = json.loads(path.read_text(encoding="utf-8"))
        base_name = adapter.get("base_model_name_or_path")
    if not base_name or not isinstance(base_name, str):
        raise ValueError(
            f"'{name}' is an adapter, but `base_model_name_or_path` in its `adapter_config.json` is {base_name!r}. "
            "Set it to the directory or Hub name of its base model."
        )
    if Path(base_name).is_dir() and directory.samefile(base_name):
        raise ValueError(
            f"'{name}' has an adapter and its base model in one directory. Save the adapter in a directory of its own."
        )
    revision = None if Path(base_name).is_dir() else adapter.get("revision") or _trained_revision(directory)
    try:
        base = _directory(base_name, revision)
        if not (base / "config.json").exists():
            raise ValueError(f"'{base_name}' contains no `config.json`.")
        _require_weights(base_name, base)
    except ValueError as error:
        raise ValueError(f"The base model of the adapter '{name}' was not found: {error}") from error
    return ModelFiles(name, directory, base, revision)


def _directory(name: str, revision: str | None = None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
        if not list(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(name, revision=revision, allow_patterns=[*MODEL_FILES, "*.bin"]))
    except Exception as error:
        at = "" if revision is None else f" at revision '{revision}'"
        reason = _in_one_line(error)
        raise ValueError(f"'{name}' is not a directory and cannot be loaded from the Hub{at}: {reason}") from error
    return directory


def _require_weights(name: str, directory: Path) -> None:
    if not _weights(directory):
        raise ValueError(f"'{name}' contains no weights: neither `*.safetensors` nor `pytorch_model*.bin`.")


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


_VOCABULARY = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken")


def _tokenizer_files(directory: Path) -> list[Path]:
    """
    Finds the files by the names that transformers gives them: a run or its evaluation may write other files into the
    directory. A tokenizer in files of other names is recognized by its tokens, see [`trl_a3po.evaluation.runs`].
    """
    return _matching(
        directory,
        *_VOCABULARY,
        *("special_tokens_map.json", "added_tokens.json"),
        *("chat_template*", "additional_chat_templates/*", "processor_config.json", "preprocessor_config.json"),
    )


def _matching(directory: Path, *patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def _hash_of(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        total.update(f"{path.name} {hash_of_file(path)}\n".encode())
    return total.hexdigest()


# The chat template and the tokens of the training


def trained_chat_template_kwargs(files: ModelFiles) -> dict[str, Any] | None:
    """
    `chat_template_kwargs` of the run that trained the model, from `training_args.bin` beside it. None if the file is
    missing or not from a GRPO run. No code in the file is run.
    """
    values = _training_arguments(files.directory)
    if "chat_template_kwargs" not in values:
        return None
    found = values["chat_template_kwargs"] or {}
    return found if isinstance(found, dict) else None


def _trained_revision(directory: Path) -> str | None:
    """Revision of the model from which the run started. TRL's scripts do not write it into `adapter_config.json`."""
    options = _training_arguments(directory).get("model_init_kwargs")
    revision = options.get("revision") if isinstance(options, dict) else None
    return revision if isinstance(revision, str) else None


def _training_arguments(directory: Path) -> dict[str, Any]:
    """The arguments in `training_args.bin`; none if it cannot be read. No code in the file is run."""
    try:
        with zipfile.ZipFile(directory / "training_args.bin") as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return vars(_InertUnpickler(io.BytesIO(archive.read(name))).load())
    except Exception:  # a pickle that is not whole raises errors of any type
        return {}


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
        vocabulary (`int`, *optional*): Number of tokens that the model has; None if its configuration does not say.
        template_kwargs (`dict`): Passed to the chat template.
        reasoning_delimiters (`tuple[str, ...]`): Texts that end the reasoning; none if the whole text is the answer.
    """

    processor: PreTrainedTokenizerBase | ProcessorMixin
    end_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...]
    context: int | None
    vocabulary: int | None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_delimiters: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "Chat":
        tokenizer = _tokenizer_of(processor)
        declared = generation_config.eos_token_id if generation_config is not None else None
        ids = [tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])]
        if not all(each is None or isinstance(each, int) for each in ids):
            raise ValueError(f"`eos_token_id` must be a whole number or a list of whole numbers, got {declared!r}.")
        image = getattr(config, "image_token_id", None) if isinstance(processor, ProcessorMixin) else None
        return cls(
            processor=processor,
            # Some configurations write -1 for none.
            end_ids=tuple(sorted({each for each in ids if each is not None and each >= 0})),
            suppressed_ids=() if image is None else (image,),
            context=getattr(config.get_text_config(), "max_position_embeddings", None),
            vocabulary=getattr(config.get_text_config(), "vocab_size", None),
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

    def check(self, prompts: Iterable[Prompt]) -> None:
        """
        Tries the chat template on one conversation of each sequence of roles.

        Raises:
            `ValueError`: there is no chat template, or it refuses one of them.
        """
        if not self.processor.chat_template:
            raise ValueError(
                "The tokenizer of the model has no chat template, and problems are prompts of a chat. Save one as "
                "`chat_template.jinja` in the directory of the model, or choose a model that has one."
            )
        tried = set()
        for prompt in prompts:
            roles = ", ".join(message["role"] for message in prompt)
            if roles in tried:
                continue
            tried.add(roles)
            try:
                self.encode(prompt)
            except Exception as error:  # a template may raise anything
                raise ValueError(
                    f"The chat template of the model refuses a conversation of {roles}: {_in_one_line(error)}. The "
                    f"first is {prompt!r:.200}."
                ) from error

    def decode(self, ids: list[int]) -> str:
        return cast(str, self.processor.decode(ids, skip_special_tokens=True))

    def answer(self, prompt_ids: list[int], ids: list[int]) -> str:
        """
        The part of a completion that the reward of the training reads.

        A response template of the tokenizer takes the reasoning out, as in TRL. `reasoning_delimiters` do so
        as in [`~trl.rewards.reasoning_accuracy_reward`]: the first that the text has counts, and a text that has none
        has no answer.
        """
        tokenizer = _tokenizer_of(self.processor)
        if any(getattr(tokenizer, name, None) is not None for name in _PARSES_BY):
            context: dict[str, Any] = {"prefix": prompt_ids} if "response_template" in _PARSES_BY else {}
            text = parse_response(tokenizer, ids, **context)["content"]
        else:
            text = self.decode(ids)
        if not self.reasoning_delimiters:
            return text
        return next((text.split(each)[-1] for each in self.reasoning_delimiters if each in text), "")


def _tokenizer_of(processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def load_chat(
    files: ModelFiles,
    template_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    are_of_training: bool = False,
) -> Chat:
    """
    Loads the tokenizer or processor of a model, and the settings of its chat template.

    Args:
        files ([`ModelFiles`]): The model.
        template_kwargs (`dict`, *optional*): Arguments of the chat template.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run code of the model's repository.
        are_of_training (`bool`, *optional*, defaults to `False`):
            Whether the arguments are those of the training. One that the template does not read is then no error but a
            warning, because it had no effect there either.

    Raises:
        `ValueError`: the tokenizer cannot be loaded or has no chat template, the template does not read one of
        `template_kwargs`, or an end token is not a number.
    """
    config = load_config(files, trust_remote_code)
    directory = files.tokenizer
    # If there is only a tokenizer, the model was trained on text only.
    has_processor = any((directory / f"{name}_config.json").exists() for name in ("processor", "preprocessor"))
    kind = AutoProcessor if has_processor else AutoTokenizer
    if not _matching(directory, *_VOCABULARY):
        raise ValueError(f"'{directory}' has no tokenizer. Save the one of the model there (`save_pretrained`).")
    # The class depends on the configuration, which the directory of an adapter does not have.
    options = {"config": config} if files.is_adapter else {}
    with loading(f"the tokenizer in '{directory}'"):
        processor = kind.from_pretrained(str(directory), trust_remote_code=trust_remote_code, **options)
    with loading(f"the model '{files.base}'"):
        if (files.base / "generation_config.json").exists():
            generation_config = GenerationConfig.from_pretrained(str(files.base))
        else:
            generation_config = GenerationConfig.from_model_config(config)
    template = processor.chat_template
    if not template:
        raise ValueError(
            f"The tokenizer of '{files.name}' has no chat template. Save one as `chat_template.jinja` in its "
            "directory."
        )
    unread = [name for name in template_kwargs or {} if not re.search(rf"\b{re.escape(name)}\b", str(template))]
    if unread:
        message = f"`chat_template_kwargs`: the chat template of '{files.name}' ignores {', '.join(unread)}."
        if not are_of_training:
            raise ValueError(message)
        logger.warning("%s It is an argument of the training, in `training_args.bin`.", message)
    with loading(f"the model '{files.base}'"):
        chat = Chat.of(processor, config, generation_config, template_kwargs)
    with loading(f"the adapter '{files.name}'"):
        return replace(chat, vocabulary=max(embeddings_of_adapter(files).values(), default=chat.vocabulary))


def load_config(files: ModelFiles, trust_remote_code: bool = False) -> PretrainedConfig:
    """
    Loads the configuration of the model, or of an adapter's base model.

    Raises:
        `ValueError`: it cannot be loaded, or names no class of a model.
    """
    with loading(f"the model '{files.base}'"):
        config = AutoConfig.from_pretrained(str(files.base), trust_remote_code=trust_remote_code)
        named = config.architectures or [""]
        if not hasattr(transformers, named[0]) and not getattr(config, "auto_map", None):
            raise ValueError(
                f"`architectures` in its `config.json` is {config.architectures}. It must name a class of "
                f"transformers {transformers.__version__}."
            )
    return config


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


def load_model(directory: Path, dtype: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """
    Loads the model as TRL does for training, with the class that its configuration names.

    Raises:
        `ValueError`: it cannot be loaded, or does not generate text, or weights are missing or have other sizes than
        the configuration says. transformers would fill them with random numbers.
    """
    # With transformers 5.3.0, TRL calls a method of the loaded model, and so cannot return anything beside it.
    if transformers.__version__ != "5.3.0":
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the sizes are checked below
    with loading(f"the model '{directory}'"):
        loaded: Any = create_model_from_path(
            str(directory), dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
        model, info = loaded if isinstance(loaded, tuple) else (loaded, {})
        if missing := info.get("missing_keys"):
            raise ValueError(f"its files do not have all weights of {type(model).__name__}: {_listed(missing)}.")
        if mismatched := info.get("mismatched_keys"):
            names = [each if isinstance(each, str) else each[0] for each in mismatched]  # also shapes since 5.0
            raise ValueError(f"its weights have other sizes than its `config.json` says: {_listed(names)}.")
        if not model.can_generate():
            raise ValueError(f"{type(model).__name__} does not generate text.")
    return model


def check_weights(directory: Path, trust_remote_code: bool = False) -> None:
    """
    Checks the names and sizes of the weights for vLLM, which takes missing ones for loaded. No weight is read.
    Quantized weights, and those of classes that transformers does not have, are not checked.

    Raises:
        `ValueError`: weights are missing or have other sizes than the configuration says.
    """
    config = AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    if hasattr(transformers, config.architectures[0]) and getattr(config, "quantization_config", None) is None:
        load_model(directory, "float32", trust_remote_code, device_map="meta")


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_adapted_model(files: ModelFiles, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a model with an adapter that cannot be merged into it, such as prompt tuning."""
    with loading(f"the adapter '{files.name}'"):
        from peft import PeftModel

        model = _load_base(files, dtype, trust_remote_code)
        return PeftModel.from_pretrained(model, str(files.directory)).eval()  # type: ignore[return-value]


def _load_base(files: ModelFiles, dtype: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """The base model of an adapter, with as many tokens as its training gave it."""
    model = load_model(files.base, dtype, trust_remote_code, **options)
    trained = embeddings_of_adapter(files)
    layers: Any = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    for name, tokens in trained.items():
        if layers[name] is None or (before := len(layers[name].weight)) == tokens:
            continue
        if missing := layers.keys() - trained.keys():
            raise ValueError(
                f"its training changed the number of tokens from {before} to {tokens}, and it does not have the new "
                f"weights of {_listed(missing)}. Merge it where it was trained, and evaluate the merged model."
            )
        model.resize_token_embeddings(tokens, mean_resizing=False)  # the adapter replaces all of these weights
        break
    return model


def embeddings_of_adapter(files: ModelFiles) -> dict[str, int]:
    """
    The number of tokens in embeddings and output, by their names, if an adapter has them as a whole. PEFT saves them
    if the training has changed their number.
    """
    path = files.directory / "adapter_model.safetensors"
    if not files.is_adapter or not path.exists():
        return {}
    tokens = {}
    with safe_open(path, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118  # it is no mapping
            found = re.search(r"\.(embed_tokens|lm_head)(\.base_layer)?\.weight$", name)
            if found is not None:
                tokens[found[1]] = weights.get_slice(name).get_shape()[0]
    return tokens


def can_be_merged(files: ModelFiles) -> bool:
    with loading(f"the adapter '{files.name}'"):
        from peft import PeftConfig

        return not PeftConfig.from_pretrained(str(files.directory)).is_prompt_learning


@contextmanager
def ordinary_checkpoint(
    files: ModelFiles, dtype: str, parent: Path, trust_remote_code: bool = False
) -> Iterator[Path]:
    """
    The directory of an ordinary checkpoint. For an adapter, it is a temporary directory with the adapter merged into
    its base model; otherwise it is the model's own directory.

    Args:
        files (`ModelFiles`): The model.
        dtype (`str`): Data type of the merged model.
        parent (`Path`): Where the temporary directory is made. Those of killed evaluations there are removed.
        trust_remote_code (`bool`): Whether to run code from the model's repository.

    Raises:
        `ValueError`: the adapter cannot be loaded, or merging it changes the output of the model.
    """
    if not files.is_adapter:
        yield files.base
        return
    for mark in parent.glob(f"{TEMPORARY}-*/{TEMPORARY}"):
        if mark.read_text(encoding="utf-8") == mark.parent.name:
            shutil.rmtree(mark.parent, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}-", dir=parent))
    try:
        (directory / TEMPORARY).write_text(directory.name, encoding="utf-8")
        with loading(f"the adapter '{files.name}'"):
            model = _merged(files, trust_remote_code).to(getattr(torch, dtype))
            model.generation_config = GenerationConfig()  # the samplers read none
            model.save_pretrained(directory)
            for path in (*files.base.glob("*.py"), *_tokenizer_files(files.tokenizer)):
                shutil.copy(path, directory)
            del model
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _merged(files: ModelFiles, trust_remote_code: bool) -> PreTrainedModel:
    from peft import PeftConfig, PeftModel

    model = _load_base(files, "float32", trust_remote_code, device_map=None)
    adapter = PeftConfig.from_pretrained(str(files.directory))
    if not _relies_on_tied_weights(adapter):
        _untie(model)
    # As PEFT maps names that an older transformers gave.
    names = getattr(model, "_checkpoint_conversion_mapping", None)
    with warnings.catch_warnings():
        # PEFT warns about merging into tied embeddings. They were just untied.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        # Weights that PEFT does not find are those of an adapter without effect.
        warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
        adapted = PeftModel.from_pretrained(model, str(files.directory)).eval()
        # Only loading them again says for which weights the model has no place.
        unexpected = adapted.load_adapter(str(files.directory), "default", key_mapping=names).unexpected_keys
        # Copies, which PEFT writes beside trained embeddings if their number has changed.
        copies = re.compile(r"\.(embed_tokens|lm_head)\.(modules_to_save|original_module)\.")
        unexpected = [name for name in unexpected if not copies.search(name)]
        if unexpected:
            raise ValueError(f"its base model has no place for its weights {_listed(unexpected)}.")
        expected = _some_logits(adapted, model.config)
        merged = adapted.merge_and_unload()
    computed = _some_logits(merged, model.config)
    difference = ((computed - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    if not difference < MERGE_TOLERANCE:
        raise ValueError(
            f"{adapter.peft_type} gives other logits after it is merged into its base model: they differ by "
            f"{difference:.1e} of the largest."
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
