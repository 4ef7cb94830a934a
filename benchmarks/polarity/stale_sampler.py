"""A sampler that lags behind the policy, as engines on another machine do, and says what it sampled with."""

import torch


class StaleSampler:
    """
    A `rollout_func` that samples from a copy of the policy, renewed after a fixed number of rollouts.

    Nothing corrects for the lag: TRL's importance ratio starts at the policy that the rollout finds, as it would
    without `vllm_importance_sampling_correction`.

    Args:
        rollouts (`int`): Number of rollouts that a copy serves.
    """

    def __init__(self, rollouts: int):
        self._rollouts, self._calls = rollouts, 0

    def __call__(self, prompts, trainer):
        if self._calls % self._rollouts == 0:
            policy = trainer.accelerator.unwrap_model(trainer.model)
            # Not a deep copy: TRL may have replaced the policy's `forward`, and the copy's would run the policy.
            self._model = type(policy)(policy.config).to(policy.device).eval()
            self._model.load_state_dict(policy.state_dict())
        self._calls += 1
        tokenizer = trainer.processing_class
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device)
        width = batch["input_ids"].shape[1]
        with torch.no_grad():
            output = self._model.generate(
                **batch, do_sample=True, max_new_tokens=trainer.max_completion_length, disable_compile=True
            )
            attention_mask = torch.cat([batch["attention_mask"], torch.ones_like(output[:, width:])], dim=1)
            logits = self._model(output, attention_mask=attention_mask).logits[:, width - 1 : -1]
        sampled = output[:, width:]  # (B, T)
        logps = logits.log_softmax(-1).gather(-1, sampled[:, :, None])[:, :, 0]
        ended = (sampled == tokenizer.eos_token_id).long()
        lengths = ((ended.cumsum(1) - ended) == 0).sum(1).tolist()  # the first end is part of the completion
        return {
            "prompt_ids": [
                ids[mask.bool()].tolist()
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ],
            "completion_ids": [ids[:length].tolist() for ids, length in zip(sampled, lengths, strict=True)],
            "logprobs": [row[:length].tolist() for row, length in zip(logps, lengths, strict=True)],
        }
