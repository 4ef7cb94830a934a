import subprocess
import sys

import pytest

import trl_a3po


def test_import_loads_neither_torch_nor_trl():
    code = (
        "import sys, trl_a3po; dir(trl_a3po); trl_a3po.__version__;"
        "assert not {'torch', 'trl', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve():
    for name in trl_a3po.__all__:
        assert getattr(trl_a3po, name) is not None
        assert name in dir(trl_a3po)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'trl_a3po' has no attribute 'A3POTrianer'"):
        _ = trl_a3po.A3POTrianer
