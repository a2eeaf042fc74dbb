"""The drop-in module: dense as ever, and able to record a run and to edit it."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, overload

import torch
from torch import nn

from fisedit import mask as masks
from fisedit.alignment import TokenAlignment
from fisedit.capture import Call, Signature, bind_call
from fisedit.config import CompileConfig, DetectConfig
from fisedit.edit import Edit, Edits
from fisedit.edit_session import EditSession
from fisedit.errors import NestedSessionError, UnknownOptionError, UnsupportedDtypeError
from fisedit.program import Program
from fisedit.recording import Recording, RecordSession
from fisedit.runtime.cost_model import CostModel


class Session(Protocol):
    """What a ``with`` block does to the calls made inside it."""

    name: str

    def run(self, call: Call) -> Any: ...


# Which session the calls of this thread or task belong to, by the identity of the model. A context variable, not a
# flag on the module: threads that edit at the same time do not see each other's.
_sessions: contextvars.ContextVar[dict[int, Session]] = contextvars.ContextVar("fisedit_sessions", default={})  # noqa: B039


class CompiledUNet(nn.Module):
    """A U-Net that can record and edit. Made by :func:`fisedit.compile`.

    It shares parameters, buffers and submodules with the original, so that ``state_dict``, ``.to`` and
    ``named_modules`` see the same names, and every other attribute (``config``, ``dtype``, ...) is the original's.
    Outside ``record`` and ``edit`` a call is the original's own forward.
    """

    def __init__(
        self, unet: nn.Module, config: CompileConfig, build: Callable[[nn.Module, Call, CompileConfig], Program]
    ) -> None:
        super().__init__()
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, registry, getattr(unet, registry))
        object.__setattr__(self, "_unet", unet)
        self.training = unet.training
        self.compile_config = config
        self.cost_model = CostModel(config.cost)
        self._build = build
        self._programs: dict[Signature, Program] = {}
        self._lock = threading.RLock()
        self._identity = object()
        self._captured_structure: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        session = _sessions.get().get(id(self))
        if session is None:
            return self._unet(*args, **kwargs)
        return session.run(bind_call(self._unet, args, kwargs))

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Run the calls inside the ``with`` block dense and keep their feature maps.

        Yields the :class:`Recording`; give its ``on_step_end`` to a diffusers pipeline for an exact background later.

        Raises:
            NestedSessionError: inside another ``record`` or ``edit`` of this model.
            UnsupportedCaptureError, UnsupportedDtypeError: at the first call, if the model cannot be captured.
        """
        recording = self._new_recording()
        with self._open(RecordSession(recording, self.program)):
            yield recording
        recording.complete = True

    @overload
    def edit(
        self, base: Recording, mask: Any = None, *, alignment: TokenAlignment | None = None,
        detect: DetectConfig | None = None, record: bool = False,
    ) -> AbstractContextManager[Edit]: ...  # fmt: skip

    @overload
    def edit(
        self, base: Sequence[Recording], mask: Sequence[Any] | None = None, *,
        alignment: Sequence[TokenAlignment | None] | None = None, detect: DetectConfig | None = None,
        record: bool = False,
    ) -> AbstractContextManager[Edits]: ...  # fmt: skip

    @contextmanager
    def edit(
        self, base: Any, mask: Any = None, *, alignment: Any = None, detect: DetectConfig | None = None,
        record: bool = False,
    ) -> Iterator[Any]:  # fmt: skip
        """Edit a recorded run: the calls inside the ``with`` block compute only what the new words touch.

        Args:
            base: the recording; it is only read, and may be edited any number of times, also at once. Or a list of
                them, one for each of several edits that every call carries (the same one, if it is edited several
                times): samples are ordered by part of guidance, then edit, then image.
            mask: where the image may change (tensor, array or PIL image of any size); ``None`` finds it. For a list of
                bases, a list.
            alignment: which token continues which; ``None`` infers it from the text embeddings. For a list, a list.
            detect: how the mask is found.
            record: keep this edit's own feature maps, so that ``edit.recording`` can be edited in turn.

        Yields:
            The :class:`Edit`; the :class:`Edits` for a list of bases.

        Raises:
            ForeignRecordingError, IncompleteRecordingError, SessionClosedError: ``base`` cannot be edited here.
            RecordingMismatchError: at the first call, if its settings differ from the recorded ones.
            InvalidMaskError, NestedSessionError, UnknownOptionError.
        """
        several = isinstance(base, (list, tuple))
        bases = list(base) if several else [base]
        each = [_for_each("mask", mask, bases, several), _for_each("alignment", alignment, bases, several)]
        config = detect or DetectConfig()
        edits = Edits(self._new_edit(b, m, a, config, record) for b, m, a in zip(bases, *each, strict=True))
        with self._open(EditSession(edits, self.program, self.cost_model)):
            yield edits if several else edits[0]
        for edit in edits:
            if edit.recording is not None:
                # An edit that ended before its mask was found mixes two runs: it cannot be edited in turn.
                edit.recording.latents, edit.recording.complete = edit.latents, edit.mask is not None

    def _new_edit(
        self, base: Recording, mask: Any, alignment: TokenAlignment | None, detect: DetectConfig, record: bool
    ) -> Edit:
        if not isinstance(base, Recording):
            raise UnknownOptionError(option="base", given=base, allowed="a recording that record() or edit() gave")
        base.check_editable(self._identity, self.model_name, self._weights())
        if mask is not None:
            size = next(iter(base.calls.values())).sample.shape[-2:]
            mask = masks.user_mask(mask, (int(size[0]), int(size[1])))[None]
        return Edit(base, detect, self._new_recording() if record else None, alignment, mask)

    def _new_recording(self) -> Recording:
        return Recording(self._identity, self.model_name, self._weights())

    def _weights(self) -> int:
        """A number that changes when a parameter is replaced or written to in place."""
        return hash(tuple((id(p), 0 if p.is_inference() else p._version) for p in self._unet.parameters()))

    def _structure(self) -> int:
        """A number that changes when modules or parameters are exchanged, or plain settings of a module (FreeU)."""
        settings = [
            tuple((k, v if isinstance(v, (bool, int, float, str)) else type(v)) for k, v in vars(module).items())
            for module in self._unet.modules()
        ]
        return hash((tuple(settings), *map(id, self._unet.modules()), *map(id, self._unet.parameters())))

    @contextmanager
    def _open(self, session: Session) -> Iterator[None]:
        active = _sessions.get()
        if id(self) in active:
            raise NestedSessionError(opened=session.name, active=active[id(self)].name)
        with self._lock:
            if (structure := self._structure()) != self._captured_structure:
                self._programs.clear()
                self._captured_structure = structure
        token = _sessions.set({**active, id(self): session})
        try:
            yield
        finally:
            _sessions.reset(token)

    def program(self, call: Call) -> Program:
        """The graphs for a call's signature, captured on the first such call.

        Raises:
            UnsupportedCaptureError: the model cannot be traced.
            UnsupportedDtypeError: half precision on a CPU.
        """
        sample = call.tensors[call.sample]
        if sample.dtype == torch.float16 and sample.device.type == "cpu":
            raise UnsupportedDtypeError(dtype="float16", device="cpu", supported=("float32", "bfloat16"))
        with self._lock:
            signature = call.signature
            if signature not in self._programs:
                self._programs[signature] = self._build(self._unet, call, self.compile_config)
            return self._programs[signature]

    def inspect(self, kind: str = "edit") -> str:
        """The graphs captured so far as text, with what each pass did and every op that stays dense."""
        if not self._programs:
            return "Nothing is captured yet: the first call inside record() or edit() does it."
        return "\n\n".join(program.inspect(kind) for program in self._programs.values())

    @property
    def model_name(self) -> str:
        parameters = sum(p.numel() for p in self._unet.parameters())
        return f"{type(self._unet).__name__} with {parameters / 1e6:.1f} M parameters"

    def train(self, mode: bool = True) -> CompiledUNet:
        self._unet.train(mode)
        self.training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledUNet:
        """A copy of the model with weights of its own, which captures anew; recordings of this one are not its."""
        return CompiledUNet(copy.deepcopy(self._unet, memo), self.compile_config, self._build)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_unet"), name)

    def extra_repr(self) -> str:
        return f"compiled by fisedit, {len(self._programs)} signatures captured"


def _for_each(option: str, given: Any, bases: list[Recording], several: bool) -> list[Any]:
    """An option of one edit, or of each of several."""
    if not several or given is None:
        return [given] * len(bases)
    if not isinstance(given, (list, tuple)) or len(given) != len(bases):
        raise UnknownOptionError(option=option, given=given, allowed=f"a list of {len(bases)}, one for each base")
    return list(given)
