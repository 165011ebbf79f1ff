"""The decoder over many ranks: FSDP2 (Zhao et al. 2023), one group of parameters a block.

Embedding, final norm and head are the root's group, which stays gathered between forward and
backward pass: the fused loss, or a reward model's, reads the head's weight as a plain tensor, and
writes its gradient, outside of any module's forward. Gradients are summed over ranks, not averaged:
the loss is divided by a denominator that all ranks share.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import Decoder, huggingface_views


def shard(decoder: Decoder, mesh: DeviceMesh, dtype: torch.dtype, reshard_after_forward: bool = True) -> None:
    """Give every rank of `mesh` its rows of each parameter; a mesh (replicate, shard) keeps copies of those (HSDP).

    Blocks compute in `dtype`, gathered from the parameters' own type, and gradients are reduced in
    fp32. `reshard_after_forward` frees a block's gathered weights until its backward pass. A
    decoder on the meta device takes memory for its shards alone, in `to_empty`.
    """
    if mesh.size() == 1 and {parameter.dtype for parameter in decoder.parameters()} == {dtype}:
        return  # nothing to share and nothing to cast: FSDP would copy all weights and gradients several times a pass
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in decoder.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(decoder, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def free_gathered(decoder: Decoder) -> None:
    """Drop gathered weights after forward passes that no backward pass follows: they would be stale once the shards
    have changed.
    """
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """A parameter's rows on this rank, as a view to write in, and the number of the first."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    local = parameter.to_local()
    if not local.shape[0]:
        return local, 0
    (chunk,) = parameter.__create_chunk_list__()
    return local, chunk.offsets[0]


def is_finite(parameter: Tensor) -> Tensor:
    """Whether a parameter's rows on this rank hold numbers alone, 0-d bool on the device."""
    local, _ = local_rows(parameter)
    ends = torch.stack(torch.aminmax(local)) if local.numel() else local  # in one pass, without a mask of its size
    return ends.isfinite().all()


def full_tensors(
    parameters: Mapping[str, Tensor],  # a decoder's, sharded or not
    config: ModelConfig,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every weight, whole, in `dtype` (None: its own), under the names of Hugging Face checkpoints.

    One parameter is gathered at a time, on every rank: all of them must go through to the end.
    """
    for name, parameter in parameters.items():
        whole = parameter.detach().to(dtype or parameter.dtype)
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        yield from huggingface_views({name: whole}, config).items()
