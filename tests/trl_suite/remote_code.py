"""The stand-in for a model whose code comes with it: saved along, and imported from there by whoever trusts it."""

from transformers import Qwen2Config, Qwen2ForCausalLM


class RemoteConfig(Qwen2Config):
    model_type = "remote"


class RemoteForCausalLM(Qwen2ForCausalLM):
    config_class = RemoteConfig


RemoteConfig.register_for_auto_class()
RemoteForCausalLM.register_for_auto_class("AutoModelForCausalLM")
