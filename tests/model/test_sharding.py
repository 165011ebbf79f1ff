"""A sharded decoder reads its own rows alone, computes what the whole one does, and sums its gradients in fp32."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ranks
from flashgrpo.model.batch import PackedBatch
from flashgrpo.model.checkpoint import (
    empty_decoder,
    init_decoder,
    load_checkpoint,
    load_weights,
    read_config,
    save_checkpoint,
)
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.sharding import free_gathered, full_tensors, is_finite, shard

pytestmark = pytest.mark.xdist_group("ranks")
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
}


def open_sharded(folder: Path, dtype: torch.dtype, backend: str | None = None):
    decoder = empty_decoder(read_config(folder), torch.float32, "cpu")
    if backend:
        decoder.compile_blocks(backend)
    shard(decoder, init_device_mesh("cpu", (dist.get_world_size(),)), dtype)
    decoder.to_empty(device="cpu")
    load_weights(decoder, folder)
    return decoder


def gradients(decoder, batch: PackedBatch, passes: int = 1) -> dict[str, torch.Tensor]:
    parameters = dict(decoder.named_parameters())
    for _ in range(passes):
        decoder(batch).float().square().sum().backward()
    return {
        name: tensor.clone()
        for name, tensor in full_tensors(
            {n: p.grad for n, p in parameters.items() if p.grad is not None}, decoder.config
        )
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    save_checkpoint(init_decoder(ModelConfig.from_dict(CONFIG), seed=0), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def batch(pack) -> PackedBatch:
    return pack([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]], prefix=[-1, 0, 0, -1])


def sharded_gradients(folder: Path, batch: PackedBatch, dtype: torch.dtype, backend: str | None, passes: int):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    decoder = open_sharded(folder, dtype)
    with torch.no_grad():
        hidden = decoder(batch)
    free_gathered(decoder)
    compiled = gradients(open_sharded(folder, dtype, backend), batch) if backend else None
    return hidden, gradients(decoder, batch, passes), compiled


def assert_equal_gradients(found, wanted, times: int, tolerance: float):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - times * gradient).norm() <= tolerance * times * gradient.norm(), name


def test_gradients_are_those_of_the_whole_decoder(folder, batch):
    """The sum over two ranks that see the same tokens; compiled blocks are gathered as others are."""
    whole = load_checkpoint(folder)
    for hidden, *found in ranks.run(sharded_gradients, 2, folder, batch, torch.float32, "aot_eager", 1):
        torch.testing.assert_close(hidden, whole(batch))
        for each in found:
            whole.zero_grad()
            assert_equal_gradients(each, gradients(whole, batch), times=2, tolerance=1e-6)


def test_bfloat16_gradients_add_up_in_fp32_compiled_or_not(folder, batch):
    """Three times a number, over ranks, and the sum of some passes are other numbers in bfloat16. Cosines and sines
    stay in fp32, so that hidden states are equal bit for bit.
    """
    ((hidden, once, compiled),) = ranks.run(sharded_gradients, 1, folder, batch, torch.bfloat16, "eager", 1)
    assert torch.equal(hidden, load_checkpoint(folder, dtype=torch.bfloat16)(batch))
    assert_equal_gradients(compiled, once, times=1, tolerance=1e-6)
    for found, often, _ in ranks.run(sharded_gradients, 3, folder, batch, torch.bfloat16, None, 7):
        assert torch.equal(found, hidden)
        assert_equal_gradients(often, once, times=21, tolerance=1e-5)


def loading_peak(folder: Path) -> int:
    """Bytes by which the peak of resident memory lies above what there was before the model was opened."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    is_finite(torch.zeros(1))  # the code of the check is memory, too, and the same for every model
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    open_sharded(folder, torch.float32)
    return memory("VmHWM") - before


def memory(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def test_a_rank_holds_no_more_than_its_shard_and_a_tensor(tmp_path):
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "head_dim": 128,
        "num_hidden_layers": 4,
        "vocab_size": 4096,
    }
    decoder = init_decoder(ModelConfig.from_dict({**CONFIG, **sizes}), seed=0, dtype=torch.bfloat16)
    save_checkpoint(decoder, tmp_path / "model")
    own_shard = 4 * sum(p.numel() for p in decoder.parameters()) / 2
    largest = 2 * max(p.numel() for p in decoder.parameters())
    assert own_shard > 5 * largest
    for peak in ranks.run(loading_peak, 2, tmp_path / "model"):
        assert own_shard < peak < 1.3 * own_shard + largest
