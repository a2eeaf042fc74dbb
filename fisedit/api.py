"""``compile``: the whole pipeline on one page. capture -> passes -> lower -> executor."""

from __future__ import annotations

from typing import Any

from torch import nn

from fisedit.capture import Call, capture
from fisedit.capture_checks import CaptureChecks, kept_attributes, plain_forward
from fisedit.config import CompileConfig
from fisedit.module import CompiledUNet
from fisedit.passes import pipeline
from fisedit.passes.base import PassLog, run_passes
from fisedit.program import Program


def compile(unet: nn.Module, config: CompileConfig | None = None, **options: Any) -> CompiledUNet:
    """Make a U-Net that can record a run and edit it sparsely; otherwise it is the same dense model.

    The result takes the place of ``unet`` in any Stable Diffusion code and shares its parameters. Nothing is traced
    now: the first call inside ``record()`` or ``edit()`` captures the graph for its shapes, dtype and device.

    Args:
        unet: any module ``unet(sample [B, C, H, W], timestep, ...)``, in eval mode.
        config: a :class:`CompileConfig`, or its fields as keyword ``options`` (``kv``, ``cost``, ``provider``,
            ``dense``, ``cache``).

    Raises:
        UnknownOptionError: an option has a value that it does not take.
        TypeError: ``unet`` is not a module, or an option does not exist.
    """
    if config is not None and options:
        raise TypeError("give compile a config or options, not both")
    if isinstance(unet, CompiledUNet):
        if (config or CompileConfig(**options)) != unet.compile_config and (config or options):
            raise TypeError("this U-Net is compiled already, with other options; compile the original")
        return unet
    if not isinstance(unet, nn.Module):
        raise TypeError(f"compile takes the U-Net module (pipe.unet), not {type(unet).__name__}")
    return CompiledUNet.of(unet, config or CompileConfig(**options), build_program)


def build_program(unet: nn.Module, call: Call, config: CompileConfig) -> Program:
    """Capture ``unet`` for one call signature and bring its graph into canonical form.

    Raises:
        UnsupportedCaptureError: the model cannot be traced, or its graph would not stand for every call.
    """
    with plain_forward(unet), call.in_autocast():
        checks = CaptureChecks(unet, call)
        with kept_attributes(unet):
            captured = capture(unet, call)
    checks.check(captured)
    program = Program(captured, config)
    program.logs["canonical"] = PassLog("canonical")
    run_passes(program.captured.module, pipeline.canonical_passes(), program.logs["canonical"])
    return program
