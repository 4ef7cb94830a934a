"""Adapters: what trains, what the KL term refers to, quantised models, and what is saved, loaded and resumed."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from support import tiny
from support.training import SGD, Recorder, assert_same_update, different, make, moved, train, update_difference
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import GRPOTrainer

from trl_a3po import A3POTrainer
from trl_a3po.update.packed_forward import trl_has_fused_head


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def fresh_adapter(model_dir):
    """The trainer's arguments for an adapter that changes nothing yet."""
    return {"model": model_dir, **tiny.lora()}


def own_adapter(model_dir):
    """The trainer's arguments for a model that comes with an adapter, which changes what it says."""
    torch.manual_seed(1)
    lora = tiny.lora()["peft_config"]
    lora.init_lora_weights = False
    return {"model": get_peft_model(load(model_dir), lora)}


BOTH = pytest.mark.parametrize("arguments", [fresh_adapter, own_adapter], ids=["peft_config", "PeftModel"])


# What trains


@BOTH
def test_the_adapter_trains_and_nothing_else(arguments, model_dir, tmp_path):
    trainer = train(tmp_path, arguments=arguments(model_dir))
    assert moved(trainer) == {name for name in trainer.start if "lora_" in name}
    assert trainer.state.log_history[0]["a3po/positive/selected_fraction"] > 0


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_neutral_settings_are_grpo_to_the_last_bit_with_an_adapter_of_ones_own(beta, model_dir, tmp_path):
    ours = train(tmp_path, arguments=own_adapter(model_dir), beta=beta, **tiny.NEUTRAL)
    theirs = train(tmp_path, GRPOTrainer, arguments=own_adapter(model_dir), beta=beta)
    assert_same_update(ours, theirs)


def test_two_adapters_at_once_are_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="You passed a `PeftModel` instance together with a `peft_config`"):
        make(tmp_path, arguments={**own_adapter(model_dir), **tiny.lora()})


# The reference of the KL term


def completion_logps(model, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logps = model.to(ids.device).eval()(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
    logps = logps.gather(2, ids[:, 1:, None]).squeeze(2)
    return logps[:, -batch["completion_ids"].shape[1] :] * batch["completion_mask"]


@BOTH
@pytest.mark.parametrize("fields", [tiny.PLAIN, {}], ids=["plain", "savings"])
def test_the_reference_is_the_model_as_it_came(arguments, fields, model_dir, tmp_path):
    trainer = train(tmp_path, Recorder, arguments=arguments(model_dir), beta=0.1, max_steps=4, **fields)
    assert trainer.ref_model is None
    model = arguments(model_dir)["model"]
    reference = load(model) if model == model_dir else model
    assert len(trainer.batches) == 4
    for batch in trainer.batches:
        ours = batch["ref_per_token_logps"] * batch["completion_mask"]
        torch.testing.assert_close(ours, completion_logps(reference, batch), rtol=1e-4, atol=1e-5)
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-9)
    assert min(kl[1:]) > 1e-5


# Quantised models


@register_quantization_config("rounding")
class RoundingConfig(QuantizationConfigMixin):
    def __init__(self, decimals, **kwargs):
        self.quant_method = "rounding"
        self.decimals = decimals


@register_quantizer("rounding")
class RoundingQuantizer(HfQuantizer):
    """Rounds the weights: a quantisation that needs neither a GPU nor a package of its own."""

    is_trainable = True

    def is_serializable(self, **kwargs):
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        pass

    def _process_model_after_weight_loading(self, model, **kwargs):
        for parameter in model.parameters():
            parameter.data = parameter.data.round(decimals=self.quantization_config.decimals)


def quantized(quantization_config, as_argument):
    """Arguments of the trainer and fields of its config, for either place where TRL takes a quantisation."""
    if not as_argument:
        return {}, {"model_init_kwargs": {"quantization_config": quantization_config}}
    if "quantization_config" not in inspect.signature(GRPOTrainer).parameters:
        pytest.skip("this TRL takes the quantisation in `model_init_kwargs` alone")
    return {"quantization_config": quantization_config}, {}


AS_ARGUMENT = pytest.mark.parametrize("as_argument", [False, True], ids=["model_init_kwargs", "quantization_config"])


@AS_ARGUMENT
def test_an_adapter_trains_on_a_quantised_model(as_argument, model_dir, tmp_path):
    arguments, fields = quantized(RoundingConfig(decimals=1), as_argument)
    trainer = train(tmp_path, arguments={**fresh_adapter(model_dir), **arguments}, **fields)
    end = tiny.parameters(trainer)
    assert moved(trainer) == {name for name in end if "lora_" in name}
    assert all(torch.equal(value, value.round(decimals=1)) for name, value in end.items() if "lora_" not in name)
    theirs = train(tmp_path, GRPOTrainer, arguments={**fresh_adapter(model_dir), **arguments}, **fields)
    neutral = train(tmp_path, arguments={**fresh_adapter(model_dir), **arguments}, **tiny.NEUTRAL, **fields)
    assert_same_update(neutral, theirs)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_the_update_of_a_model_of_few_bits_is_that_of_grpo(bits, tmp_path):
    """With real kernels. TRL keeps the adapter of such a model in half precision."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny.save(tmp_path / "model", **sizes)
    config = BitsAndBytesConfig(**{bits: True})
    if bits == "load_in_4bit":
        config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype = "nf4", torch.float32
    fields = {**SGD, "learning_rate": 1.0, "model_init_kwargs": {"quantization_config": config}}
    ours, theirs = (
        train(tmp_path, trainer_class, model=model, arguments=tiny.lora(), **fields, **settings)
        for trainer_class, settings in (
            (A3POTrainer, {"positive_low_scale": 1.0, "negative_high_scale": 1.0}),
            (GRPOTrainer, {}),
        )
    )
    assert ours._packing.reason is None or not trl_has_fused_head()
    assert moved(ours) == moved(theirs) == {name for name in ours.start if "lora_" in name}
    assert update_difference(ours, theirs) < 0.02


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@AS_ARGUMENT
def test_without_bitsandbytes_transformers_says_what_to_install(as_argument, model_dir, tmp_path):
    arguments, fields = quantized(BitsAndBytesConfig(load_in_8bit=True), as_argument)
    with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
        make(tmp_path, arguments={**fresh_adapter(model_dir), **arguments}, **fields)


# What is saved


def assert_speaks_alike(loaded, trained):
    prompt = torch.tensor([tiny.tokenizer()("12+4=")["input_ids"]], device=trained.device)
    loaded, trained = loaded.to(trained.device).eval(), trained.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(prompt).logits, trained(prompt).logits, rtol=1e-4, atol=1e-4)
    greedy = [model.generate(prompt, do_sample=False, max_new_tokens=16) for model in (loaded, trained)]
    assert torch.equal(*greedy)


@BOTH
def test_the_saved_adapter_and_the_checkpoints_load_back(arguments, model_dir, tmp_path):
    trainer = train(tmp_path, arguments=arguments(model_dir), save_strategy="steps", save_steps=3)
    trainer.save_model(tmp_path / "saved")
    for directory in (tmp_path / "saved", tmp_path / "checkpoint-3"):
        assert not list(Path(directory).glob("model*"))  # the adapter alone
        assert_speaks_alike(PeftModel.from_pretrained(load(model_dir), directory), trainer.model)


@BOTH
def test_the_merged_model_loads_back_without_peft(arguments, model_dir, tmp_path):
    trainer = train(tmp_path, arguments=arguments(model_dir))
    trainer.save_model(tmp_path / "saved")
    trained = PeftModel.from_pretrained(load(model_dir), tmp_path / "saved")
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert not isinstance(merged, PeftModel)
    assert_speaks_alike(merged, trained)
    assert different(dict(merged.named_parameters()), dict(load(model_dir).named_parameters()))


# What is resumed


OWN_ADAPTER = pytest.param(
    own_adapter,
    id="PeftModel",
    marks=pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.0.0"),
        reason="of two adapters in a checkpoint, transformers 4 loads the reference alone",
    ),
)


@pytest.mark.parametrize("arguments", [pytest.param(fresh_adapter, id="peft_config"), OWN_ADAPTER])
def test_a_resumed_run_keeps_its_reference(arguments, model_dir, tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "beta": 0.1}
    whole = train(tmp_path, arguments=arguments(model_dir), **fields)
    resumed = make(tmp_path, arguments=arguments(model_dir), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_update(resumed, whole)
    kl = [[entry.get("kl") for entry in trainer.state.log_history] for trainer in (whole, resumed)]
    assert kl[0] == kl[1]
