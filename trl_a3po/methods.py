"""
The methods that `shaping` of [`A3POConfig`] names: A3PO and those of [`~trl_a3po.peers`], with their papers.

The model card of [`A3POTrainer`] cites the paper of the method that was used. To cite one of these papers for a
trainer of your own:

```python
>>> class StareTrainer(A3POTrainer):
...     _name, _paper = METHODS["stare"]
```
"""

import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from . import peers


A3PO = "a3po"


class Method(NamedTuple):
    """The name of a method, and its paper as TRL's model card takes it: title, arXiv identifier and BibTeX entry."""

    name: str
    paper: dict[str, str]


def _preprint(key: str, title: str, authors: str, year: int, arxiv: str) -> dict[str, str]:
    citation = f"""\
        @article{{{key},
            title        = {{{{{title}}}}},
            author       = {{{authors}}},
            year         = {year},
            eprint       = {{arXiv:{arxiv}}},
        }}"""
    return {"title": title, "id": arxiv, "citation": textwrap.dedent(citation)}


_A3PO = {
    "title": "Rethinking Sample Polarity in Reinforcement Learning with Verifiable Rewards",
    "id": "2512.21625",
    "citation": textwrap.dedent("""\
        @inproceedings{tang2026rethinking,
            title        = {{Rethinking Sample Polarity in Reinforcement Learning with Verifiable Rewards}},
            author       = {Xinyu Tang and Yuliang Zhan and Zhixun Li and Wayne Xin Zhao and
                            Zhenduo Zhang and Zujie Wen and Zhiqiang Zhang and Jun Zhou},
            year         = 2026,
            booktitle    = {Proceedings of the 64th Annual Meeting of the Association for Computational Linguistics
                            (Volume 1: Long Papers)},
            url          = {https://aclanthology.org/2026.acl-long.134/},
            eprint       = {arXiv:2512.21625},
        }"""),
}
_STEER = _preprint(
    "hao2025rethinking",
    "Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective",
    "Zhezheng Hao and Hong Wang and Haoyang Liu and Jian Luo and Jiarui Yu and Hande Dong and Qiang Lin and Can Wang "
    "and Jiawei Chen",
    2025,
    "2510.10150",
)

# By the value of `shaping`. All but the first are the names of functions of `peers`.
METHODS = {
    A3PO: Method(
        "A3PO",
        _A3PO,
    ),
    "w_reinforce": Method(
        "W-REINFORCE",
        _preprint(
            "zhu2025surprising",
            "The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning",
            "Xinyu Zhu and Mengzhou Xia and Zhepei Wei and Wei-Lin Chen and Danqi Chen and Yu Meng",
            2025,
            "2506.01347",
        ),
    ),
    "advantage_reweighting": Method(
        "Advantage Reweighting",
        _preprint(
            "yang2025do",
            "Do Not Let Low-Probability Tokens Over-Dominate in RL for LLMs",
            "Zhihe Yang and Xufang Luo and Zilong Wang and Dongqi Han and Zhiyuan He and Dongsheng Li and Yunjian Xu",
            2025,
            "2505.12929",
        ),
    ),
    "entropy_advantage": Method(
        "the entropy advantage",
        _preprint(
            "cheng2025reasoning",
            "Reasoning with Exploration: An Entropy Perspective",
            "Daixuan Cheng and Shaohan Huang and Xuekai Zhu and Bo Dai and Wayne Xin Zhao and Zhenliang Zhang and "
            "Furu Wei",
            2025,
            "2506.14758",
        ),
    ),
    "aspo": Method(
        "ASPO",
        _preprint(
            "wang2025aspo",
            "ASPO: Asymmetric Importance Sampling Policy Optimization",
            "Jiakang Wang and Runze Liu and Lei Lin and Wenping Hu and Xiu Li and Fuzheng Zhang and Guorui Zhou and "
            "Kun Gai",
            2025,
            "2510.06062",
        ),
    ),
    "position_bonus": Method(
        "the position bonus",
        _preprint(
            "deng2025decomposing",
            "Decomposing the Entropy-Performance Exchange: The Missing Keys to Unlocking Effective Reinforcement "
            "Learning",
            "Jia Deng and Jie Chen and Zhipeng Chen and Wayne Xin Zhao and Ji-Rong Wen",
            2025,
            "2508.02260",
        ),
    ),
    "fipo": Method(
        "FIPO",
        _preprint(
            "ma2026fipo",
            "FIPO: Eliciting Deep Reasoning with Future-KL Influenced Policy Optimization",
            "Chiyu Ma and Shuo Yang and Kexin Huang and Jinda Lu and Haoming Meng and Shangshang Wang and Bolin Ding "
            "and Soroush Vosoughi and Guoyin Wang and Jingren Zhou",
            2026,
            "2603.19835",
        ),
    ),
    "forking_tokens": Method(
        "forking tokens",
        _preprint(
            "wang2025beyond",
            "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM "
            "Reasoning",
            "Shenzhi Wang and Le Yu and Chang Gao and Chujie Zheng and Shixuan Liu and Rui Lu and Kai Dang and "
            "Xionghui Chen and Jianxin Yang and Zhenru Zhang and Yuqiong Liu and An Yang and Andrew Zhao and Yang Yue "
            "and Shiji Song and Bowen Yu and Gao Huang and Junyang Lin",
            2025,
            "2506.01939",
        ),
    ),
    "clip_cov": Method(
        "Clip-Cov",
        _preprint(
            "cui2025entropy",
            "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
            "Ganqu Cui and Yuchen Zhang and Jiacheng Chen and Lifan Yuan and Zhi Wang and Yuxin Zuo and Haozhan Li "
            "and Yuchen Fan and Huayu Chen and Weize Chen and Zhiyuan Liu and Hao Peng and Lei Bai and Wanli Ouyang "
            "and Yu Cheng and Bowen Zhou and Ning Ding",
            2025,
            "2505.22617",
        ),
    ),
    "steer_exponential": Method("STEER (exponential)", _STEER),
    "steer_linear": Method("STEER (linear)", _STEER),
    "gtpo_simplified": Method(
        "a simplified GTPO",
        _preprint(
            "tan2025gtpo",
            "GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy",
            "Hongze Tan and Zihan Wang and Jianfei Pan and Jinghao Lin and Hao Wang and Yifan Wu and Tao Chen and "
            "Zhihang Zheng and Zhihao Tang and Haihua Yang",
            2025,
            "2508.04349",
        ),
    ),
    "aepo": Method(
        "the entropy-aware advantage of AEPO",
        _preprint(
            "dong2025agentic",
            "Agentic Entropy-Balanced Policy Optimization",
            "Guanting Dong and Licheng Bao and Zhongyuan Wang and Kangzhi Zhao and Xiaoxi Li and Jiajie Jin and "
            "Jinghan Yang and Hangyu Mao and Fuzheng Zhang and Kun Gai and Guorui Zhou and Yutao Zhu and Ji-Rong Wen "
            "and Zhicheng Dou",
            2025,
            "2510.14545",
        ),
    ),
    "stare": Method(
        "STARE",
        _preprint(
            "luo2026stare",
            "STARE: Surprisal-Guided Token-Level Advantage Reweighting for Policy Entropy Stability",
            "Haipeng Luo and Qingfeng Sun and Songli Wu and Can Xu and Wenfeng Deng and Han Hu and Yansong Tang",
            2026,
            "2606.19236",
        ),
    ),
}


def peer(shaping: str) -> Callable[..., Tensor]:
    """The function of [`~trl_a3po.peers`] that `shaping` names."""
    return getattr(peers, shaping)


@cache
def settings_of(shaping: str) -> Mapping[str, float | None]:
    """The settings of a peer by name, with their defaults: its keyword parameters that are numbers."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(peer(shaping)).parameters.items()
        if parameter.default is not parameter.empty
        and float in (parameter.annotation, *get_args(parameter.annotation))
    }


@cache
def needs_of_trainer(shaping: str) -> frozenset[str]:
    """The keyword parameters of a peer that have no default and are no arguments of the hook."""
    return frozenset(
        name
        for name, each in inspect.signature(peer(shaping)).parameters.items()
        if each.kind is each.KEYWORD_ONLY and each.default is each.empty and name not in peers.HOOK_ARGUMENTS
    )


def read_settings(settings: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """
    `shaping_args` as a dictionary, from JSON if it is a string.

    Raises:
        `ValueError`: it is not a dictionary.
    """
    if isinstance(settings, str):
        with suppress(json.JSONDecodeError):  # it is still a string then
            settings = json.loads(settings)
    if not isinstance(settings, Mapping | None):
        raise ValueError(
            f"`shaping_args` must be a dictionary, or one in JSON, got {settings!r}. Pass for example "
            "'{\"top_ratio\": 0.1}' on the command line, or a mapping in YAML."
        )
    return dict(settings or {})


def check_shaping(shaping: Any, settings: Mapping[str, Any]) -> None:
    """
    Checks the values of `shaping` and `shaping_args`.

    Raises:
        `ValueError`: naming the value, what is allowed and the fix.
    """
    if shaping not in list(METHODS):  # a list, because a value from YAML may not be hashable
        raise ValueError(
            f"`shaping` must be one of {', '.join(map(repr, METHODS))}, got {shaping!r}. Pass 'a3po' for A3PO, or "
            "override `A3POTrainer.shape_advantages` for a method of your own."
        )
    if shaping == A3PO:
        if settings:
            raise ValueError(
                f"`shaping_args` has no effect with `shaping='a3po'`, got {dict(settings)}. The settings of A3PO are "
                "options of their own, for example `positive_low_scale`. Leave `shaping_args` out, or set `shaping`."
            )
        return
    defaults = settings_of(shaping)
    listed = ", ".join(f"`{name}` ({default})" for name, default in defaults.items())
    for name in settings:
        if name not in defaults:
            raise ValueError(
                f"`shaping_args` has `{name}`, which is not a setting of `shaping={shaping!r}`. Its settings (and "
                f"their defaults) are {listed}."
            )
    # A method checks its settings when it is called.
    token, number = torch.zeros(1, 1), 0.0
    batch = dict.fromkeys(peers.HOOK_ARGUMENTS, token) | {"rewards": token[0], "progress": number}
    try:
        peer(shaping)(token[0], **batch, **dict.fromkeys(needs_of_trainer(shaping), number), **settings)
    except ValueError as error:
        raise ValueError(
            f"`shaping_args` of `shaping={shaping!r}`: {error} The settings (and their defaults) are {listed}."
        ) from error
