# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from zsq.errors import UsageError
from zsq.teacher.sources import load_source
from zsq.zoo import ZOO, build


def test_resnet20_computes_what_pytorchcv_computes():
    provider = pytest.importorskip("pytorchcv.model_provider")
    ours = build("resnet20_cifar10")
    theirs = provider.get_model("resnet20_cifar10").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_resnet20_is_a_source_with_metadata():
    source = load_source("zsq:resnet20_cifar10")
    assert source.input_shape == (3, 32, 32)
    assert source.mean == (0.4914, 0.4822, 0.4465)
    assert source.std == (0.2470, 0.2435, 0.2616)
    assert source.resize is None
    assert not source.module.training
    # trained, not initialised: batch norms have seen data
    assert source.module.features.init_block.bn.running_mean.abs().sum() > 0


@pytest.mark.parametrize("name", ZOO)
def test_builders_take_their_input_shape(name):
    module = load_source(f"zsq:{name}", weights="random").module
    assert module(torch.zeros(2, *ZOO[name].input_shape)).shape == (2, 10)


def test_digits_needs_weights():
    with pytest.raises(UsageError, match=r"zsq:digits comes without weights: .*--weights FILE"):
        load_source("zsq:digits")
