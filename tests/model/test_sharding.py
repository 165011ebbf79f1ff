"""A sharded decoder reads its own rows alone, computes what the whole one does, and sums its gradients in fp32."""

from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

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
from flashgrpo.model.sharding import full_tensors, is_finite, shard

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
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
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


def sharded_gradients(folder: Path, batch: PackedBatch, dtype: torch.dtype, backend: str | None, passes: int):
    return gradients(open_sharded(folder, dtype, backend), batch, passes)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_checkpoint(init_decoder(ModelConfig.from_dict(CONFIG), seed=0), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def batch(pack) -> PackedBatch:
    return pack([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]], prefix=[-1, 0, 0, -1])


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_compiled_or_not_gradients_are_those_of_the_whole_decoder(folder, batch, backend):
    """The sum over two ranks that see the same tokens."""
    wanted = gradients(load_checkpoint(folder), batch)
    for found in ranks.run(sharded_gradients, 2, folder, batch, torch.float32, backend, 1):
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name] - 2 * gradient).norm() <= 1e-6 * 2 * gradient.norm(), name


def test_bfloat16_gradients_add_up_in_fp32(folder, batch):
    """Over three ranks and 100 passes: in bfloat16 three times a number is another, and 257 is not there at all."""
    (once,) = ranks.run(sharded_gradients, 1, folder, batch, torch.bfloat16, None, 1)
    often, *_ = ranks.run(sharded_gradients, 3, folder, batch, torch.bfloat16, None, 100)
    for name, gradient in once.items():
        assert gradient.dtype == torch.float32
        assert (often[name] - 300 * gradient).norm() <= 1e-5 * 300 * gradient.norm(), name


def hidden_states(folder: Path, batch: PackedBatch) -> torch.Tensor:
    return open_sharded(folder, torch.bfloat16)(batch).detach()


def test_bfloat16_hidden_states_are_those_of_a_bfloat16_decoder(folder, batch):
    """Bit for bit: cosines and sines stay in fp32."""
    wanted = load_checkpoint(folder, dtype=torch.bfloat16)(batch)
    for hidden in ranks.run(hidden_states, 2, folder, batch):
        assert torch.equal(hidden, wanted)


def loading_peak(folder: Path) -> int:
    """Bytes by which the peak of resident memory lies above what there was before the model was opened."""
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
        "num_hidden_layers": 6,
        "vocab_size": 4096,
    }
    decoder = init_decoder(ModelConfig.from_dict({**CONFIG, **sizes}), seed=0, dtype=torch.bfloat16)
    save_checkpoint(decoder, tmp_path / "model")
    own_shard = 4 * sum(p.numel() for p in decoder.parameters()) / 4
    largest = 2 * max(p.numel() for p in decoder.parameters())
    assert own_shard > 5 * largest
    for peak in ranks.run(loading_peak, 4, tmp_path / "model"):
        assert own_shard < peak < 1.3 * own_shard + largest
