import math
from dataclasses import asdict

import pytest

from flashgrpo.kernels.grpo_loss import LossConfig

pytestmark = pytest.mark.twin


def test_presets_are_the_published_settings():
    default = asdict(LossConfig())
    published = {
        "grpo": {"kl_coef": 0.04},
        "r1": {"clip_low": 10, "clip_high": 10, "kl_coef": 0.001},
        "dapo": {"aggregate": "token_mean", "clip_high": 0.28},
        "bnpo": {"aggregate": "token_mean"},
        "dr_grpo": {"aggregate": "constant", "advantage_scale": "none"},
        "gspo": {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "behavior_level": "geometric"},
        "cispo": {"aggregate": "token_mean", "objective": "cispo", "clip_high": 4},
        "sapo": {"objective": "sapo"},
    }
    for name, changes in published.items():
        assert asdict(LossConfig.preset(name)) == default | changes
    assert (default["tau_pos"], default["tau_neg"], default["top_entropy"], default["kl_weight"]) == (
        1,
        1.05,
        1,
        "none",
    )
    assert (default["clip_low"], default["clip_high"], default["kl_coef"]) == (0.2, 0.2, 0)
    assert (default["aggregate"], default["advantage_scale"], default["kl_estimator"]) == ("sequence_mean", "std", "k3")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio_level": "word"}, "ratio_level is 'word'; wanted one of token, sequence"),
        ({"objective": "ppo"}, "objective"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"aggregate": "mean"}, "aggregate"),
        ({"advantage_scale": "mad"}, "advantage_scale"),
        ({"behavior_mode": "drop"}, "behavior_mode"),
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"clip_high": math.nan}, "clip_high is nan"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"entropy_coef": math.inf}, "entropy_coef"),
        ({"clip_max": 3.0, "objective": "cispo"}, "clip_max is 3.0, which 'cispo' does not have; leave it None"),
        ({"clip_max": 3.0, "objective": "sapo"}, "clip_max is 3.0, which 'sapo' does not have; leave it None"),
        ({"behavior_level": "mean"}, "behavior_level is 'mean'; wanted one of token, sequence, geometric"),
        ({"kl_weight": 1.0}, "kl_weight is 1.0; wanted one of none, ratio"),
        ({"kl_weight": "ratio", "ratio_level": "sequence"}, "unbiased with ratio_level 'token' alone"),
        ({"tau_neg": 0.0}, "tau_pos is 1.0 and tau_neg 0.0; wanted both above 0"),
        ({"top_entropy": 0}, "top_entropy is 0; wanted a share"),
        ({"top_entropy": 1.5}, "top_entropy is 1.5; wanted a share"),
        ({"off_policy_threshold": -1.0}, "off_policy_threshold is -1.0"),
        ({"behavior_cap": 0.4, "behavior_floor": 0.5, "behavior_mode": "mask"}, "behavior_cap is 0.4"),
        ({"behavior_cap": "2"}, "behavior_cap is '2'; wanted a finite number, 0 or above, or None"),
        ({"clip_low": None}, "clip_low is None"),
        ({"kl_coef": True}, "kl_coef is True"),
    ],
)
def test_bad_configurations_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_unknown_presets_and_fields_are_named():
    with pytest.raises(ValueError, match="known presets: grpo, r1"):
        LossConfig.preset("ppo")
    with pytest.raises(ValueError, match="no field 'kl'"):
        LossConfig.preset("grpo", kl=0.1)
