"""The datasets that `trl-a3po train` passes to TRL's script."""

import json
import os

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset
from trl.scripts.utils import DatasetConfig

from trl_a3po.cli.dataset_options import resolve_datasets, take_slice


def write(path, answer):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"question": "?", "answer": answer}) + "\n")
    os.utime(path, (0, 0))
    return str(path)


def load(name, as_mixture, streams=False):
    """The answers in the rows that TRL's script would train on."""
    script = ScriptArguments(dataset_name=None if as_mixture else name, dataset_streaming=streams)
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path=name)] if as_mixture else [])
    resolve_datasets(script, mixture, evaluates=False, max_steps=1)
    return [row["answer"] for row in get_dataset(mixture)["train"]]


@pytest.mark.parametrize("as_mixture", [False, True], ids=["file", "mixture"])
def test_a_path_is_no_pattern_and_an_edited_file_is_read_again(as_mixture, tmp_path):
    write(tmp_path / "run1" / "a1.jsonl", "of another file")
    write(tmp_path / "run[1]" / "a1.jsonl", "of another file")
    for answer in ("before", "after"):
        assert load(write(tmp_path / "run[1]" / "a[1].jsonl", answer), as_mixture) == [answer]
    assert load(str(tmp_path / "run[1]" / "a[1].jsonl"), as_mixture, streams=True) == ["after"]
    with pytest.raises(ValueError, match=r"takes the folder '.*run\[1\]' for a pattern"):
        load(str(tmp_path / "run[1]"), as_mixture)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"Line 1 of '.*a.jsonl' is not UTF-8"):
        load(str(tmp_path / "a.jsonl"), as_mixture=False)


def test_a_slice_has_the_numbers_of_its_rows(tmp_path):
    dataset = Dataset.from_dict({"answer": list(range(8))})
    rows, numbers = take_slice(dataset, "[75%:]")
    assert (list(rows["answer"]), list(numbers)) == ([6, 7], [6, 7])
    assert take_slice(dataset, None) == (dataset, None)
