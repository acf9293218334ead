"""Run an unmodified Megatron-LM training script with MoBA's own flags, which the script cannot take::

    PYTHONPATH=/path/to/Megatron-LM torchrun --nproc-per-node 2 -m moba_cp.megatron.pretrain \\
        /path/to/Megatron-LM/pretrain_gpt.py --moba-block-size 512 --moba-topk 8 --moba-full-attention-last-n-layers 3 \\
        --transformer-impl local --no-create-attention-mask-in-dataloader --attention-dropout 0 ...

The flags of MoBA are taken out of the command line, the layer spec they describe is put where ``--spec`` finds it
(``moba_cp.megatron.pretrain layer_spec``), and the script runs as if it had been started itself. From Megatron-LM 0.19 on
Megatron's flags choose the layers (Transformer Engine, experts, ...) as without ``--spec``; before, MoBA's layers are those
that :func:`moba_cp.megatron.arguments.layer_spec_from_arguments` builds. ``pretrain_hybrid.py`` gets the spec of
:mod:`moba_cp.megatron.hybrid`. With ``--moba-cpu`` the script runs on CPU, over gloo, through :mod:`moba_cp.megatron.cpu`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import megatron.core

from .arguments import add_moba_arguments, layer_spec_from_arguments, settings_from_arguments
from .core_attention import MoBACoreAttention
from .launch import check_script, run_script
from .spec import moba_spec_builder
from .swap import is_pipelined

_MODULE = "moba_cp.megatron.pretrain"

layer_spec: Any = None
"""The spec for ``--spec``; set by :func:`main`."""


def main(arguments: list[str]) -> None:
    """Run ``arguments[0]`` with the other arguments, minus MoBA's, plus ``--spec``.

    Raises:
        SystemExit: no script, no ``megatron.training`` for ``--moba-cpu``, or wrong flags.
        ValueError: a combination that is not supported, ``--spec`` among them, or a script that ignores the spec.
        RuntimeError: another version of Megatron-Core than the script's is in use.
    """
    flags, script, rest = split(arguments)
    check_script(script, needs_training=flags.moba_cpu)
    if flags.moba_cpu:
        from .cpu import use_cpu_as_cuda

        use_cpu_as_cuda(training_scripts=True)
    # The module that ``--spec`` imports is not this one if this one runs as __main__.
    vars(importlib.import_module(_MODULE))["layer_spec"] = _spec(flags, script)
    _refuse_models_without_moba(script)
    run_script(script, [*rest, "--spec", _MODULE, "layer_spec"])


def _spec(flags: argparse.Namespace, script: str) -> Any:
    settings = settings_from_arguments(flags)
    if "hybrid" in Path(script).stem:
        from .hybrid import hybrid_spec

        return hybrid_spec(**settings)
    models = Path(megatron.core.__path__[0]).parent / "training" / "models" / "gpt.py"
    if models.exists():  # scripts of this version take a callable, which knows the whole configuration
        return moba_spec_builder(**settings)
    return layer_spec_from_arguments(flags)


def _refuse_models_without_moba(script: str) -> None:
    """Raise as soon as ``megatron.training`` has built a model that ignored ``--spec``, as scripts for other models than GPT and
    ``--use-legacy-models`` do: it would train with stock attention. Scripts with a training loop of their own are not checked."""
    try:
        from megatron.training import training
    except ImportError:
        return
    get_model = training.get_model

    @functools.wraps(get_model)
    def checked(*args: Any, **kwargs: Any) -> Any:
        models = get_model(*args, **kwargs)
        attentions = [module for chunk in models for module in chunk.modules() if hasattr(module, "core_attention")]
        has_moba = any(isinstance(attention.core_attention, MoBACoreAttention) for attention in attentions)
        if not has_moba and (attentions or not any(is_pipelined(chunk) for chunk in models)):
            raise ValueError(
                f"{Path(script).name} built a model without MoBA: it ignores --spec, as --use-legacy-models and scripts for "
                "other models than GPT do"
            )
        return models

    vars(training)["get_model"] = checked


def split(arguments: list[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """MoBA's flags (with the few of Megatron's that decide a layer's parts), the script, and the script's arguments.

    Raises:
        SystemExit: no script, or wrong flags.
        ValueError: ``--spec`` is given.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", allow_abbrev=False)
    parser.add_argument("script", help="Megatron-LM's pretrain_gpt.py, or a script like it")
    add_moba_arguments(parser)
    parser.add_argument("--moba-cpu", action="store_true", help="run on CPU over gloo")
    flags, rest = parser.parse_known_args(arguments)
    if any(argument == "--spec" or argument.startswith("--spec=") for argument in rest):
        raise ValueError("--spec is what this script sets: start the training script itself, or leave --spec out")
    megatron = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    megatron.add_argument("--transformer-impl", default="transformer_engine")
    megatron.add_argument("--normalization", default="LayerNorm")
    megatron.add_argument("--qk-layernorm", action="store_true")
    megatron.add_argument("--qk-l2-norm", action="store_true")
    megatron.add_argument("--num-experts", type=int)
    megatron.add_argument("--num-layers", type=int)
    megatron.parse_known_args(rest, namespace=flags)
    return flags, flags.script, rest


if __name__ == "__main__":
    main(sys.argv[1:])
