"""Importing the package is silent and cheap, and registers with diffusers and transformers in any order of imports."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_silent_and_loads_no_torch() -> None:
    code = "import sys, nunchaku_py; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("False False", "")


@pytest.mark.parametrize("first", [
    "import nunchaku_py; import diffusers.quantizers.auto as a",
    "import diffusers.quantizers.auto as a; import nunchaku_py",
    "import nunchaku_py; nunchaku_py.SVDQuantConfig; import diffusers.quantizers.auto as a",
    "import nunchaku_py.lite_hook; import diffusers.quantizers.auto as a",
    "import nunchaku_py; import transformers.quantizers.auto as a",
    "import nunchaku_py.transformers_hook; import transformers.quantizers.auto as a",
])
def test_registered_whatever_comes_first(first: str) -> None:
    tables = "a.AUTO_QUANTIZER_MAPPING, a.AUTO_QUANTIZATION_CONFIG_MAPPING"
    assert run(f"{first}; print(all('nunchaku_py' in table for table in ({tables})))") == "True"


@pytest.mark.parametrize("first", [
    "import nunchaku_py; import diffusers", "import diffusers.quantizers.auto; import nunchaku_py",
    "import nunchaku_py.lite_hook", "import nunchaku_py.diffusers_hook", "import nunchaku_py.checkpoint.own; "
    "import nunchaku_py.lite_choice; import diffusers"])
def test_nunchaku_lite_is_chosen_by_us_whatever_comes_first(first: str) -> None:
    code = "import diffusers.quantizers.auto as a; print(a.AUTO_QUANTIZER_MAPPING['nunchaku_lite'].func.__module__)"
    assert run(f"{first}; {code}") == "nunchaku_py.lite_hook"


def test_the_function_quantize_survives_import_of_its_submodule() -> None:
    assert run("import nunchaku_py as nq; import nunchaku_py.quantize; print(callable(nq.quantize))") == "True"
    inner_first = "from nunchaku_py.quantize import quantize; import nunchaku_py as nq"
    assert run(f"{inner_first}; print(nq.quantize is quantize)") == "True"


def test_unknown_names_are_attribute_errors() -> None:
    import nunchaku_py

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        nunchaku_py.nonsense  # noqa: B018
    assert {"quantize", "load", "save", "set_mode", "dequantize", "SVDQuantConfig"} <= set(dir(nunchaku_py))
