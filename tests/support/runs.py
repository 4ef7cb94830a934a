"""What TRL brings besides: rollouts with tools and environments, images, experts, continuous batching."""

import inspect

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from trl import GRPOConfig

from trl_a3po import A3POTrainer

from . import tiny
from .training import SGD, make


# What a run is made of: each returns the trainer's arguments and the fields of its config, as new.


def every_other_reward(solution, **kwargs):
    """Every other completion is right; of a third of the problems, all are."""
    is_easy = [int(answer.strip("$")) % 4 == 2 for answer in solution]
    return [1.0 if easy else float(row % 2) for row, easy in enumerate(is_easy)]


def rollout(prompts, trainer):
    """Completions of which the model wrote the even positions, or nothing at all."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    lengths = [1 + 3 * i % 11 for i in range(len(prompts))]
    completion_ids = [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completion_ids,
        "logprobs": [[0.0] * length for length in lengths],
        "env_mask": [[int(i % 7 != 0 and t % 2 == 0) for t in range(length)] for i, length in enumerate(lengths)],
    }


def rollout_function():
    return {"rollout_func": rollout}, {}


# A question mark opens a call, whose argument is all that follows. In what the trainer tokenizes a dollar opens the
# model's turn; what a tool says is in braces. The model writes neither, and far more question marks than it would.
TOOL_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}?{{ call.function.name }}{{ call.function.arguments }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}${% endif %}"
)
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"query": "{content}"}}}


def calling_model():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.response_template = {
        "start_anchor": "$",
        "defaults": {"role": "assistant"},
        "fields": {
            "tool_calls": {"open": "?", "close": "<eos>", "repeats": True, "transform": CALL},
            "content": {"content": "text"},
        },
    }
    generation = {
        "max_new_tokens": 8,
        "suppress_tokens": tokenizer.convert_tokens_to_ids(list("{}$")),
        "sequence_bias": [[tokenizer.convert_tokens_to_ids(["?"]), 2.0]],
    }
    arguments = {"processing_class": tokenizer, "train_dataset": tiny.prompts(conversational=True)}
    return arguments, {"max_completion_length": 40, "generation_kwargs": generation}


def look_up(query: str) -> str:
    """
    Looks something up.

    Args:
        query: What to look up.

    Returns:
        What was found.
    """
    return "{found}" if len(query) < 8 else "{}"


def tools():
    arguments, fields = calling_model()
    return {**arguments, "tools": [look_up]}, fields


class Library:
    """Answers each question of a completion with a longer text."""

    def reset(self, **row):
        self.questions = 0
        return "ask"

    def look_up(self, query: str) -> str:
        """
        Looks something up.

        Args:
            query: What to look up.

        Returns:
            What was found.
        """
        self.questions += 1
        return "{" + "found" * self.questions + "}"


def questions_reward(environments, **kwargs):
    return [float(environment.questions) for environment in environments]


def environments():
    arguments, fields = calling_model()
    return {**arguments, "environment_factory": Library, "reward_funcs": questions_reward}, fields


def vision_model():
    pytest.importorskip("PIL.Image")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    (image_id,) = tokenizer.convert_tokens_to_ids(["<image>"])
    # The one that needs no torchvision; transformers 5 gave it a name of its own.
    image_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = LlavaProcessor(
        image_processor=image_processor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template="{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}",
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = tiny.model(vocab_size=len(tokenizer)).config
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text_config,
            vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **vision),
            image_token_index=image_id,
            vision_feature_layer=-1,
        )
    )
    return {"model": model, "processing_class": processor}, {"generation_kwargs": {"suppress_tokens": [image_id]}}


def text_with_processor():
    arguments, fields = vision_model()
    return {**arguments, "train_dataset": tiny.prompts()}, fields


def _picture(row):
    return pytest.importorskip("PIL.Image").new("RGB", (28, 28), (16 * row, 0, 255 - 16 * row))


def images():
    arguments, fields = vision_model()
    columns = tiny.prompts(conversational=True).to_dict()
    pictures = [_picture(row) for row in range(len(columns["prompt"]))]
    return {**arguments, "train_dataset": Dataset.from_dict({**columns, "image": pictures})}, fields


def images_without_column():
    """Nothing about the dataset says that its rows have images."""
    arguments, fields = vision_model()

    def add_pictures(rows):
        return {**rows, "image": [_picture(len(prompt[0]["content"])) for prompt in rows["prompt"]]}

    return {**arguments, "train_dataset": tiny.prompts(conversational=True).with_transform(add_pictures)}, fields


def experts(router_aux_loss_coef=0.0):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    knows_router_loss = hasattr(GRPOConfig, "router_aux_loss_coef")  # since TRL 1.7; before, it was left out
    fields = {"router_aux_loss_coef": router_aux_loss_coef} if knows_router_loss else {}
    return {"model": Qwen2MoeForCausalLM(config)}, fields


def router_loss():
    return experts(router_aux_loss_coef=0.5)


def continuous_batching():
    # One request at a time: how many come together is a matter of time, and with it who draws which random number.
    # The size had another name in earlier releases of transformers.
    names = inspect.signature(transformers.ContinuousBatchingConfig).parameters
    size = "page_size" if "page_size" in names else "block_size"
    batching = {"num_blocks": 64, size: 16, "max_batch_tokens": 64, "max_requests_per_batch": 1}
    return {}, {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": batching,
        "max_steps": 2,
    }


def needs(what, trl_version, transformers_version):
    versions = {trl: trl_version, transformers: transformers_version}
    return pytest.mark.skipif(
        any(Version(package.__version__) < Version(version) for package, version in versions.items()),
        reason=f"{what} came with TRL {trl_version} and transformers {transformers_version}",
    )


ROLLOUT_FUNCTION = pytest.param(rollout_function, id="rollout function")
TOOLS = pytest.param(tools, id="tools", marks=needs("tools without jmespath", "1.10", "5.13"))
ENVIRONMENTS = pytest.param(environments, id="environments", marks=needs("tools without jmespath", "1.10", "5.13"))
IMAGES = pytest.param(images, id="images")
TEXT_WITH_PROCESSOR = pytest.param(text_with_processor, id="text with a processor")
EXPERTS = pytest.param(experts, id="experts")
ROUTER_LOSS = pytest.param(router_loss, id="router loss", marks=needs("the loss of the router", "1.7", "4.56.2"))
CONTINUOUS_BATCHING = pytest.param(
    continuous_batching, id="continuous batching", marks=needs("continuous batching without a GPU", "1.7", "5.8")
)
RUNS = [
    ROLLOUT_FUNCTION,
    TOOLS,
    ENVIRONMENTS,
    IMAGES,
    TEXT_WITH_PROCESSOR,
    EXPERTS,
    ROUTER_LOSS,
    CONTINUOUS_BATCHING,
]


def make_run(run, output_dir, trainer_class=A3POTrainer, **fields):
    arguments, run_fields = run()
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, **SGD}
    arguments = {"reward_funcs": every_other_reward, **arguments}
    return make(output_dir, trainer_class, arguments=arguments, **{**defaults, **run_fields, **fields})


def train_run(*args, **kwargs):
    trainer = make_run(*args, **kwargs)
    trainer.train()
    return trainer
