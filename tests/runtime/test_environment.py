# SPDX-License-Identifier: Apache-2.0
"""The description of the machine says what is there, and imports nothing optional."""

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import onnxruntime
import pytest
import torch

from zsq.runtime import environment as module
from zsq.runtime.environment import NOT_INSTALLED, environment, version


def test_it_names_the_versions_that_are_running():
    facts = environment()
    assert facts["python"] == platform.python_version()
    assert facts["torch"]["version"] == torch.__version__
    assert facts["onnxruntime"]["version"] == onnxruntime.__version__
    assert "CPUExecutionProvider" in facts["onnxruntime"]["providers"]
    assert facts["onnx"] == metadata.version("onnx")
    assert facts["onnx_ir"] == metadata.version("onnx-ir")
    assert facts["pytorchcv"] == metadata.version("pytorchcv")


def test_it_can_be_stored_as_json_and_read_back_unchanged():
    facts = environment()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_it_tells_nothing_about_who_and_where():
    text = json.dumps(environment())
    private = {str(Path.home()), os.getcwd(), socket.gethostname()}
    if getpass.getuser() != "root":  # a word that may occur by chance
        private.add(getpass.getuser())
    assert not [name for name in private if len(name) > 3 and name in text]


def test_it_counts_cores_and_memory():
    facts = environment()
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert 1 <= facts["cpu"]["usable_cores"] <= os.cpu_count()
    assert facts["cpu"]["name"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_what_the_kernel_says():
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    kibibytes = int(fields["MemTotal"].split()[0])
    assert environment()["memory_gib"] == pytest.approx(kibibytes / 2**20, abs=0.11)


def test_the_processor_is_read_from_the_first_entry(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Fast CPU: 3 GHz\nflags\t\t: sse fma avx512_vnni amx_int8x\n"
        "\nprocessor\t: 1\nmodel name\t: Other\nflags\t\t: avx2\n"
    )
    cpu = module._cpu(cpuinfo)
    assert cpu["name"] == "Fast CPU: 3 GHz"
    assert cpu["flags"] == ["fma", "avx512_vnni"]


def test_the_processor_has_a_name_without_proc(tmp_path):
    cpu = module._cpu(tmp_path / "missing")
    assert cpu["name"] == (platform.processor() or platform.machine())
    assert cpu["flags"] == []


def test_packages_that_are_not_installed_are_said_to_be_so():
    assert version("zsq-is-not-a-package-of-this-name") == NOT_INSTALLED
    assert version("numpy") == metadata.version("numpy")


def test_gpus_are_listed_where_torch_sees_some(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert environment()["torch"]["gpus"] == ["GPU 0", "GPU 1"]


def test_optional_packages_are_not_imported():
    code = (
        "import sys; from zsq.runtime.environment import environment; environment();"
        "print([n for n in ('timm', 'torchvision', 'pytorchcv') if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert result.stdout.strip() == "[]"
