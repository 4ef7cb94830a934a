"""
Stand-ins for what TRL's tests load from the Hub: models, tokenizers and datasets of the same names, made up here.

They are laid out as the Hub's clients lay out their caches, so that nothing has to know of them: offline, and with
`HF_HOME` set to their folder, they are what the names mean.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from remote_code import RemoteForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin


ORGANIZATION = "trl-internal-testing"
REVISION = "0" * 40


def build(home: Path, names: set[str]) -> dict[str, str]:
    """
    Makes the stand-ins of the given names.

    Returns:
        Which of them could not be made, and why. Tests that need one of these fail.
    """
    left_out = {}
    for name in sorted(names):
        try:
            if name in DATASETS:
                _save_dataset(home / "datasets", name)
            else:
                _save_model(home / "hub", name)
        except Exception as error:
            reason, *_ = str(error).strip().splitlines() or [""]
            left_out[name] = f"{type(error).__name__}: {reason}"
    return left_out


# The shape of every model. The weights are large enough for each of them to have a gradient.
SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What some need besides.
MORE_SHAPE = {
    "Glm4MoeForCausalLM": {**EXPERTS, "n_routed_experts": 4, "head_dim": 4},
    "GptOssForCausalLM": {**EXPERTS, "num_local_experts": 4},
    "NemotronHForCausalLM": {
        **EXPERTS,
        "num_hidden_layers": None,
        "layers_block_type": ["mamba", "attention", "moe"],
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 4,
        "mamba_n_groups": 1,
        "ssm_state_size": 16,
    },
    "Qwen2ForSequenceClassification": {"num_labels": 1},
    "Qwen3ForSequenceClassification": {"num_labels": 1},
    "LlamaForSequenceClassification": {"num_labels": 1},
    "Qwen3MoeForCausalLM": {**EXPERTS, "num_experts": 4},
    "Qwen3_5MoeForConditionalGeneration": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
}


def _save_model(hub: Path, name: str) -> None:
    architecture = name.removeprefix("tiny-").split("-")[0]
    tokenizer = _tokenizer(architecture)
    processing_class: PreTrainedTokenizerFast | ProcessorMixin = tokenizer
    text_config = _text_config(architecture, tokenizer)
    if architecture == "RemoteForCausalLM":
        model_class, config = RemoteForCausalLM, text_config
    elif architecture in VISION:
        model_class = getattr(transformers, architecture)
        config, processing_class = VISION[architecture](text_config, tokenizer)
    elif architecture.endswith(("ForCausalLM", "ForSequenceClassification")):
        model_class, config = getattr(transformers, architecture), text_config
    else:
        raise NotImplementedError(f"{architecture} is not among those that are made up here")
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config)).to(torch.bfloat16)

    repository = hub / f"models--{ORGANIZATION}--{name}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    model.save_pretrained(snapshot)
    processing_class.save_pretrained(snapshot)


def _text_config(architecture: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **SHAPE,
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **MORE_SHAPE.get(architecture, {}),
    }


# fmt: off
# TRL's tests hand token ids to its trainers as if a model had generated them. These are the ids that occur there, and
# what they mean to Qwen2.5 and Qwen3, next to the first 256, which are bytes.
QWEN_WORDS = {
    293: " b", 314: " {", 330: ' "', 397: ">\n", 411: "out", 450: "dec", 497: '",', 522: "</", 606: "name",
    788: '":', 894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know", 1513: " don", 2765: " won",
    4913: '{"', 5212: ' {"', 5392: " tool", 6023: "hi", 6659: "call", 7692: "async", 9520: "step", 11248: "}}\n",
    13477: "rement", 14172: "tool", 16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool",
    35744: "increment", 64648: "multiply", 93054: "_multiply", 95642: '"}}\n',
}
QWEN3_5_WORDS = {
    510: "</", 866: " any", 914: "'t", 1366: " know", 1459: " don", 1628: "function", 5224: " tool",
    13744: "=screen", 16936: "Done", 22076: "_tool", 30091: "shot",
}
# fmt: on
# Words, and the id of the first special token, of the models that are handed ids. The others have a small vocabulary:
# most of a step's time is that of the logits. So has Qwen2, which one test hands ids, and fails, and sixty do not.
VOCABULARIES = {
    "Qwen3ForCausalLM": (QWEN_WORDS, 151643),
    "Qwen3MoeForCausalLM": (QWEN_WORDS, 151643),
    "Qwen3_5ForConditionalGeneration": (QWEN3_5_WORDS, 248044),
}
# Not so small that a model often ends a completion: one test needs it not to.
SMALL_VOCABULARY: tuple[dict[int, str], int] = ({}, 10000)
# fmt: off
# Counted from the first special token, as Qwen has them.
SPECIAL_TOKENS = {
    0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>",
    9: "<|vision_start|>", 10: "<|vision_end|>", 12: "<|image_pad|>", 13: "<|video_pad|>",
}
MARKUP_TOKENS = {
    14: "<tool_call>", 15: "</tool_call>", 22: "<tool_response>", 23: "</tool_response>",
    24: "<think>", 25: "</think>",
}
# fmt: on
# Further special tokens, by what processors call them.
NAMED_TOKENS = {
    "Gemma3ForConditionalGeneration": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "Gemma4ForConditionalGeneration": {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "video_token": "<|video|>",
    },
    "LlavaNextForConditionalGeneration": {"image_token": "<image>"},
}
# Those of the installed TRL, which tells models that can call tools by their template.
CHAT_TEMPLATES = {
    "Gemma3ForConditionalGeneration": "gemma3",
    "Gemma4ForConditionalGeneration": "gemma4",
    "LlavaNextForConditionalGeneration": "llava_next",
    "Qwen2VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3",
    "Qwen3_5ForConditionalGeneration": "qwen3_5_nothink",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_6",
}
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """
    Reads what the model's chat template says word by word, other text byte by byte.

    Every other id is a number, so that no two samples of a model read alike.
    """
    words, first_special = VOCABULARIES.get(architecture, SMALL_VOCABULARY)
    named = NAMED_TOKENS.get(architecture, {})
    special = {**SPECIAL_TOKENS, **dict(enumerate(named.values(), start=1 + max(MARKUP_TOKENS)))}
    template = Path(trl.__file__).parent / "chat_templates" / f"{CHAT_TEMPLATES.get(architecture, 'qwen2_5')}.jinja"
    # The first releases of TRL have no such files.
    chat_template = template.read_text(encoding="utf-8") if template.exists() else PLAIN_TEMPLATE

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = dict(enumerate(sorted(byte_level.alphabet())))
    tokens |= {i: whole.pre_tokenize_str(word)[0][0] for i, word in words.items()}
    template_words = {word for word, _ in byte_level.pre_tokenize_str(chat_template)}.difference(tokens.values())
    tokens |= dict(enumerate(sorted(template_words), start=first_special - len(template_words)))
    tokens |= {first_special + i: token for i, token in {**special, **MARKUP_TOKENS}.items()}
    vocabulary = {tokens.get(i, f"Ġ{i}"): i for i in range(1 + max(tokens))}

    backend = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special.values()))
    backend.add_tokens(list(MARKUP_TOKENS.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
        chat_template=chat_template,
    )


Vision = tuple[dict[str, Any], ProcessorMixin]

PATCH_SIZE = 14
IMAGE_SIZE = 2 * PATCH_SIZE
VISION_SHAPE = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
QWEN_VISION_SHAPE = {
    "depth": 2,
    "hidden_size": 8,
    "num_heads": 2,
    "patch_size": PATCH_SIZE,
    "initializer_range": SHAPE["initializer_range"],
}
QWEN_PIXELS = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": (2 * IMAGE_SIZE) ** 2}
QWEN2_VL_SHAPE = {"hidden_size": 16, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
QWEN3_5_SHAPE = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}


def _qwen_vl_processor(processor_class: Any, video_processor_class: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    return processor_class(
        transformers.Qwen2VLImageProcessor(patch_size=PATCH_SIZE, size=QWEN_PIXELS),
        tokenizer,
        video_processor_class(),
        chat_template=tokenizer.chat_template,
    )


def _qwen2_vl(text_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Vision:
    vision_config = {**QWEN_VISION_SHAPE, "embed_dim": 8, "hidden_size": 16}
    processor = _qwen_vl_processor(transformers.Qwen2VLProcessor, transformers.Qwen2VLVideoProcessor, tokenizer)
    return _qwen_vl_config({**text_config, **QWEN2_VL_SHAPE}, vision_config, tokenizer), processor


def _qwen2_5_vl(text_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Vision:
    vision_config = {**QWEN_VISION_SHAPE, "intermediate_size": 32, "out_hidden_size": 16, "fullatt_block_indexes": [1]}
    processor = _qwen_vl_processor(transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor, tokenizer)
    return _qwen_vl_config({**text_config, **QWEN2_VL_SHAPE}, vision_config, tokenizer), processor


def _qwen3_5(text_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Vision:
    vision_config = {**QWEN_VISION_SHAPE, "intermediate_size": 32, "out_hidden_size": 8, "num_position_embeddings": 16}
    processor = _qwen_vl_processor(transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor, tokenizer)
    return _qwen_vl_config({**text_config, **QWEN3_5_SHAPE}, vision_config, tokenizer), processor


def _qwen_vl_config(
    text_config: dict[str, Any], vision_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    return {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _gemma3(text_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Vision:
    config = {
        "text_config": {**text_config, "head_dim": 4},
        "vision_config": {
            **VISION_SHAPE,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": tokenizer.image_token_id,
        "boi_token_index": tokenizer.boi_token_id,
        "eoi_token_index": tokenizer.eoi_token_id,
    }
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _gemma4(text_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Vision:
    tokens_per_image = 70  # the least there is
    config = {
        "text_config": {
            **text_config,
            "head_dim": 4,
            "global_head_dim": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": len(tokenizer),
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {**VISION_SHAPE, "num_key_value_heads": 2, "head_dim": 4, "position_embedding_size": 1024},
        "audio_config": None,
        "image_token_id": tokenizer.image_token_id,
        "boi_token_id": tokenizer.boi_token_id,
        "eoi_token_id": tokenizer.eoi_token_id,
        "audio_token_id": tokenizer.audio_token_id,
        "boa_token_id": tokenizer.boa_token_id,
        "eoa_token_index": tokenizer.eoa_token_id,
        "video_token_id": tokenizer.video_token_id,
    }
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(image_seq_length=tokens_per_image, max_soft_tokens=tokens_per_image),
        tokenizer,
        transformers.Gemma4VideoProcessor(),
        image_seq_length=tokens_per_image,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _llava_next(text_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Vision:
    grid = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
    config = {
        "text_config": {**text_config, "model_type": "mistral"},
        "vision_config": {
            **VISION_SHAPE,
            "model_type": "clip_vision_model",
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": 8,
        },
        "image_token_index": tokenizer.image_token_id,
        "image_grid_pinpoints": grid,
    }
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_grid_pinpoints=grid,
        ),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


# Models that see images: from the configuration of the language model, and the tokenizer, to those of the whole.
VISION = {
    "Gemma3ForConditionalGeneration": _gemma3,
    "Gemma4ForConditionalGeneration": _gemma4,
    "LlavaNextForConditionalGeneration": _llava_next,
    "Qwen2VLForConditionalGeneration": _qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": _qwen2_5_vl,
    "Qwen3_5ForConditionalGeneration": _qwen3_5,
    "Qwen3_5MoeForConditionalGeneration": _qwen3_5,
}


# One of TRL's tests expects these, in this order.
PROMPTS = [
    "Beautiful is better than",
    "Explicit is",
    "Simple is better",
    "Complex",
    "Flat is better than",
    "Sparse is better",
    "Readability",
    "Special cases aren't special",
    "Although practicality beats",
    "Errors should never",
    "Unless explicitly",
    "In the face of ambiguity, refuse",
]


def _prompt(row: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[row]}


def _conversation(row: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": PROMPTS[row]}]}


def _image(row: int) -> Any:
    from PIL import Image

    return Image.effect_noise((32 + 4 * row, 40), sigma=64).convert("RGB")


def _conversation_about_image(row: int) -> dict[str, Any]:
    return {**_conversation(row), "image": _image(row)}


def _conversation_about_images(row: int) -> dict[str, Any]:
    """About none, one or two of them."""
    images = [_image(row)] * (row % 3)
    content = [{"type": "image", "text": None}] * len(images) + [{"type": "text", "text": PROMPTS[row]}]
    return {"prompt": [{"role": "user", "content": content}], "images": images}


# What makes a row, and the rows to train on. Most tests train for three epochs: those that call tools, the slowest, on
# the second of these.
DATASETS = {
    "zen": {"standard_prompt_only": (_prompt, len(PROMPTS)), "conversational_prompt_only": (_conversation, 2)},
    "zen-image": {"conversational_prompt_only": (_conversation_about_image, 5)},
    "zen-multi-image": {"conversational_prompt_only": (_conversation_about_images, 5)},
}


class _MadeUp(datasets.GeneratorBasedBuilder):
    def __init__(self, make_row: Callable[[int], dict[str, Any]], rows: int, **kwargs: Any):
        self._make_row = make_row
        self._splits = {"train": range(rows), "test": range(2)}
        super().__init__(**kwargs)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Dataset.from_list([self._make_row(1)]).features)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name, {"rows": rows}) for name, rows in self._splits.items()]

    def _generate_examples(self, rows: range) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows:
            yield row, self._make_row(row)


def _save_dataset(cache: Path, name: str) -> None:
    for config_name, (make_row, rows) in DATASETS[name].items():
        builder = _MadeUp(
            make_row,
            rows,
            cache_dir=str(cache),
            dataset_name=name,
            repo_id=f"{ORGANIZATION}/{name}",
            config_name=config_name,
            hash=REVISION,
        )
        builder.download_and_prepare()
