"""Datasets of which TRL makes no batch are refused, with the sizes."""

import pytest
import trl
from datasets import IterableDataset
from packaging.version import Version
from support import tiny
from support.training import make
from trl import GRPOTrainer

from trl_a3po import A3POConfig
from trl_a3po.training.dataset_checks import check_dataset_sizes


def config(tmp_path, **fields):
    # 2 micro-batches of 8 completions, 4 of each prompt: 4 prompts
    return tiny.config(tmp_path, gradient_accumulation_steps=2, **fields)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_rows_than_prompts_of_a_generation_batch(rows, tmp_path):
    with pytest.raises(
        ValueError, match=r"has \d rows?, fewer than the 4 prompts .*`generation_batch_size=16`"
    ) as error:
        check_dataset_sizes(config(tmp_path), tiny.prompts(rows))
    assert "Use at least 4 rows, or lower `per_device_train_batch_size`" in str(error.value)


def test_enough_rows(tmp_path):
    check_dataset_sizes(config(tmp_path), tiny.prompts(4), tiny.prompts(1))
    check_dataset_sizes(config(tmp_path, generation_batch_size=8), tiny.prompts(2))
    check_dataset_sizes(config(tmp_path), None)


def test_the_limit_is_that_of_trl(tmp_path):
    """GRPOTrainer has no batch below it, and one at it."""
    for rows, batches in [(3, 0), (4, 1)]:
        args = config(tmp_path, max_steps=-1)
        trainer = GRPOTrainer(
            tiny.model(), tiny.parity_reward, args, tiny.prompts(rows), processing_class=tiny.tokenizer()
        )
        assert bool(len(trainer.get_train_dataloader())) == bool(batches)


def test_all_processes_count(tmp_path, monkeypatch):
    monkeypatch.setattr(A3POConfig, "world_size", property(lambda self: 2))
    args = config(tmp_path)
    assert args.generation_batch_size == 32
    with pytest.raises(ValueError, match="has 7 rows, fewer than the 8 prompts"):
        check_dataset_sizes(args, tiny.prompts(7))
    check_dataset_sizes(args, tiny.prompts(8))


def test_streams_are_not_checked(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "1+1="}]))
    check_dataset_sizes(config(tmp_path, dataloader_drop_last=True), stream, stream)


@pytest.mark.skipif(Version(trl.__version__) < Version("1.9"), reason="this TRL refuses streams")
def test_a_stream_shorter_than_a_step_does_not_run_for_ever(tmp_path):
    """Two prompts are two of the four micro-batches of a step."""
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "1+1="}, {"prompt": "1+2="}]))
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    trainer = make(tmp_path, arguments={"train_dataset": stream}, max_steps=2, **fields)
    with pytest.raises(ValueError, match="ended before an optimizer step was complete, and again after it began anew"):
        trainer.train()


def test_evaluation(tmp_path):
    train = tiny.prompts(4)
    with pytest.raises(ValueError, match="The evaluation dataset has no rows"):
        check_dataset_sizes(config(tmp_path), train, tiny.prompts(0))
    with pytest.raises(ValueError, match="The evaluation dataset 'hard' has no rows"):
        check_dataset_sizes(config(tmp_path), train, {"easy": tiny.prompts(4), "hard": tiny.prompts(0)})
    dropping = config(tmp_path, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="has 1 row, which give 4 completions, fewer than an evaluation batch of 8"):
        check_dataset_sizes(dropping, train, tiny.prompts(1))
    check_dataset_sizes(dropping, train, tiny.prompts(2))
