"""What errors and absent packages tell."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["torchao.quantization", "transformers"])
def test_torchao_is_imported_without_a_word(package):
    pytest.importorskip(package.partition(".")[0])
    pytest.importorskip("torchao")
    code = (
        "import logging\n"
        "logging.basicConfig(format='%(message)s')\n"
        "from opensora.errors import require\n"
        f"found = require({package!r}, extra='x', purpose='y')\n"
        "getattr(found, 'T5EncoderModel', None)\n"
        "logging.getLogger('torchao').warning('Failed to load later')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "Failed to load later\n"
