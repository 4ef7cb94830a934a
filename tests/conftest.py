import os


# Before anything imports them: no test reaches a hub or sends telemetry.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import pytest
import tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny-model"))
