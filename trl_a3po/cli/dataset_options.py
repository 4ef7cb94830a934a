"""The dataset options of `trl-a3po train`. They are those of TRL's script, and work for local files too."""

import logging
import re

from datasets import Dataset, ReadInstruction
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from ..evaluation.problems import check_folder, file_source, is_file_name


logger = logging.getLogger(__name__)

HOLD_OUT = "Pass `--test_split_size 0.1` to hold out a tenth of the rows"


def resolve_datasets(
    script: ScriptArguments, mixture: DatasetMixtureConfig, evaluates: bool, max_steps: int
) -> tuple[str | None, str | None]:
    """
    Translates the options into those that TRL's script reads.

    With `dataset_name`, TRL's script loads the whole dataset, ignores `test_split_size` and supports no slices. So
    local files and datasets to split become a mixture of one dataset, and slices are returned for [`take_slice`].

    Args:
        script (`trl.ScriptArguments`): Changed in place.
        mixture (`trl.DatasetMixtureConfig`): Changed in place.
        evaluates (`bool`): Whether the run needs a test split.
        max_steps (`int`): Steps of the run, or -1 if it is counted in epochs.

    Returns:
        `tuple`: the slices of the train split and of the test split, for example `"[:90%]"`, or `None`.

    Raises:
        `OSError`: a file does not exist.
        `ValueError`: options do not work together. The message names them and the fix.
    """
    if mixture.datasets and script.dataset_name:
        raise ValueError("`dataset_name` and `datasets` both name data. Keep one of them.")
    if not mixture.datasets and not script.dataset_name:
        raise ValueError("There is no dataset. Pass `--dataset_name`, or `datasets` in the file of `--config`.")
    train, train_slice = _split_and_slice("dataset_train_split", script.dataset_train_split)
    test, test_slice = _split_and_slice("dataset_test_split", script.dataset_test_split)
    streams = script.dataset_streaming or mixture.streaming
    if streams and max_steps <= 0:
        raise ValueError("A stream has no length: pass `--max_steps`, or remove `--dataset_streaming`.")
    if streams and mixture.test_split_size is not None:
        raise ValueError("`test_split_size` cannot split a stream. Remove `--dataset_streaming`.")
    if mixture.test_split_size is not None:
        mixture.test_split_size = _share_or_rows(mixture.test_split_size)
        if not evaluates:  # the rows would be held out for nothing
            raise ValueError(
                "`test_split_size` holds out rows to evaluate on, but `eval_strategy` is 'no'. Pass "
                "`--eval_strategy steps`, or leave out `test_split_size`."
            )
    if streams and (train_slice or test_slice):
        raise ValueError("A stream has no slices. Remove `--dataset_streaming`.")

    if script.dataset_name:
        check_folder(script.dataset_name, script.dataset_config)
    if script.dataset_name and is_file_name(script.dataset_name):
        test = _one_split(script, mixture, evaluates, train, test, test_slice)
    elif script.dataset_name and mixture.test_split_size is not None:
        mixture.datasets = [DatasetConfig(path=script.dataset_name, name=script.dataset_config, split=train)]
        script.dataset_name, train, test = None, "train", "test"
    elif mixture.datasets:
        _check_mixture(mixture, evaluates, train, test)
    if mixture.datasets:
        mixture.streaming = streams
    script.dataset_train_split, script.dataset_test_split = train, test
    return train_slice, test_slice


def _share_or_rows(size: float) -> float:
    """The size of a test split. `datasets` needs a number of rows as an int."""
    if 0 < size < 1:
        return size
    if size < 1 or size % 1 != 0:  # not a number is no whole number either
        raise ValueError(
            "`test_split_size` must be a share of the rows between 0 and 1, such as 0.1, or a whole number of rows, "
            f"1 or more. Got {size}."
        )
    return int(size)


def _split_and_slice(option: str, name: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"([\w.-]+)(\[[^\]]*\])?", name)
    if match is None:
        raise ValueError(f"`{option}` must be a split or a slice of one, such as `train[:1000]`, got '{name}'.")
    if match[2]:
        ReadInstruction.from_spec(name)  # raises an error if the slice is wrong
    return match[1], match[2]


def _one_split(script, mixture, evaluates: bool, train: str, test: str, test_slice: str | None) -> str:
    """Makes a mixture of one file, whose rows are the split `train`. Returns the name of the test split."""
    name = script.dataset_name
    source = file_source(name)
    if train != "train":
        raise ValueError(f"`dataset_train_split` is '{train}', but a file has one split, `train`: '{name}'.")
    if script.dataset_config is not None:
        logger.warning("`dataset_config='%s'` has no effect on the file '%s'.", script.dataset_config, name)
    splits = mixture.test_split_size is not None
    if evaluates and not splits and (test != "train" or test_slice is None):
        raise ValueError(
            f"`eval_strategy` needs a test split, but the file '{name}' has none. {HOLD_OUT}. Or use slices of the "
            "file: `--dataset_train_split 'train[:90%]' --dataset_test_split 'train[90%:]'`. Or pass a folder with a "
            "train and a test file."
        )
    mixture.datasets = [DatasetConfig(**source)]
    script.dataset_name = None
    return "test" if splits else test


def _check_mixture(mixture: DatasetMixtureConfig, evaluates: bool, train: str, test: str) -> None:
    for dataset in mixture.datasets:
        if is_file_name(dataset.path):
            for option, value in file_source(dataset.path).items():
                setattr(dataset, option, value)
        else:
            check_folder(dataset.path, dataset.name, dataset.data_dir, dataset.data_files)
    if train != "train" or test != "test":
        raise ValueError(
            "`dataset_train_split` and `dataset_test_split` have no effect on `datasets`. Set `split` for each "
            "dataset instead."
        )
    if evaluates and mixture.test_split_size is None:
        raise ValueError(f"`eval_strategy` needs a test split, but `datasets` has none. {HOLD_OUT}.")


def take_slice(dataset: Dataset, part: str | None) -> tuple[Dataset, range | None]:
    """The rows of a slice such as `"[:90%]"`, and their numbers; all rows, and `None`, for `None`."""
    if part is None:
        return dataset, None
    (rows,) = ReadInstruction.from_spec(f"train{part}").to_absolute({"train": len(dataset)})
    numbers = range(rows.from_, rows.to)
    return dataset.select(numbers), numbers
