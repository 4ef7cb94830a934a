import contextlib
import gc
import os
from pathlib import Path


# Before anything is imported that reads them. No test reaches a hub or sends telemetry. Models this small gain nothing
# from threads, and on a busy machine lose much by waiting for them.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)
if os.getenv("TEST_DEVICE") == "cuda":
    # For the kernels that `support.tiny` asks for. It is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Programs that tests start import what tests share.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])])

import pytest


with contextlib.suppress(ImportError):  # the environment of vLLM does without
    from hypothesis import settings

    settings.register_profile("busy machine", settings.default, deadline=None)
    settings.load_profile("busy machine")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    from support import tiny  # not above: the process that distributes the tests would import all of it too

    return tiny.save(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(autouse=True, scope="module")
def _nothing_imported_is_searched_for_garbage():
    """As in `support.tiny`: tests import more than it does."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_precision_of_another_test():
    yield
    # transformers 4 leaves it set once a run had `bf16=True`, and every later run takes it up.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
