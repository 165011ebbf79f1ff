"""The shapes are those of the published models."""

import pytest
import torch

from flashgrpo.bench.shapes import SHAPES
from flashgrpo.model.checkpoint import empty_decoder
from flashgrpo.model.config import ModelConfig

PARAMETERS = {  # of the model cards' safetensors
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-4B": 4_022_468_096,
    "Llama-3.1-8B": 8_030_261_248,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    decoder = empty_decoder(ModelConfig.from_dict(SHAPES[name]), torch.bfloat16)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == PARAMETERS[name]
