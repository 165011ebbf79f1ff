"""What docs/api.md says: the public functions and classes, by their own signatures and docstrings."""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

PUBLIC = {  # in the order of the page
    "kernels.attention": ("packed_attention", "plan_attention", "planned_attention"),
    "kernels.decode_attention": ("decode_attention", "DecodeRows"),
    "kernels.logprob": ("gather_logprobs",),
    "kernels.grpo_loss": (
        *("grpo_loss", "logits_grpo_loss", "LossConfig", "denominator_of"),
        *("pack_padded", "group_advantages", "merge_stats"),
    ),
    "kernels.linear_grpo": ("linear_logprobs", "linear_grpo_loss"),
    "kernels.elementwise": ("rms_norm", "rope", "QKNorm", "swiglu", "swiglu_backward"),
    "model.checkpoint": ("init_decoder", "load_checkpoint", "save_checkpoint"),
    "model.batch": ("PackedBatch", "gather_predictors"),
    "grpo.recipe.load": ("load_recipe",),
    "grpo.train": ("train",),
    "grpo.types": ("Request", "Sampling", "Rollout"),
    "grpo.rollout.generator": ("sample_seeds",),
    "grpo.rollout.native": ("NativeGenerator",),
    "grpo.learn.packing": ("Group", "best_fit", "build_batch"),
    "grpo.learn.learner": ("Learner", "packed_loss"),
}


def page() -> list[str]:
    """A heading for each module and each name in it; a class is followed by its public methods."""
    lines: list[str] = []
    for module_name, names in PUBLIC.items():
        module = importlib.import_module(f"flashgrpo.{module_name}")
        lines += [f"## flashgrpo.{module_name}", ""]
        for name in names:
            found = getattr(module, name)
            lines += _described(f"### {name}", found)
            if inspect.isclass(found):
                for method in vars(found):
                    if not method.startswith("_") and inspect.isroutine(getattr(found, method)):
                        lines += _described(f"#### {name}.{method}", getattr(found, method))
    return lines[:-1]


def _described(heading: str, found: Callable[..., Any]) -> list[str]:
    docstring = (inspect.getdoc(found) or "").splitlines()
    return [heading, "", "```py", *_signature(found), "```", "", *docstring, ""]


def _signature(found: Callable[..., Any]) -> list[str]:
    """As the source has it, with the shapes in its comments; of a class the fields, and what makes it."""
    source = textwrap.dedent(inspect.getsource(found))
    node, lines = ast.parse(source).body[0], source.splitlines()
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    signature = lines[node.lineno - 1 : node.body[0].lineno - 1]
    for part in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(part, ast.AnnAssign):
            signature += lines[part.lineno - 1 : part.end_lineno]
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            signature += lines[part.lineno - 1 : part.body[0].lineno - 1]
    return [line for line in signature if line]
