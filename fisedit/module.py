"""The drop-in module: dense as ever, and able to record a run and to edit it."""

from __future__ import annotations

import contextvars
import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from fisedit import mask as masks
from fisedit.alignment import TokenAlignment
from fisedit.capture import Call, Signature, bind_call, with_timestep_tensor
from fisedit.config import CompileConfig, DetectConfig
from fisedit.edit import Edit, Edits
from fisedit.edit_session import EditSession
from fisedit.errors import (
    ModelChangedError,
    ModelGoneError,
    NestedSessionError,
    UnknownOptionError,
    UnsupportedDtypeError,
)
from fisedit.explanation import explain
from fisedit.fingerprint import Fingerprinter, ModelState
from fisedit.identity import ModelIdentity
from fisedit.program import Program
from fisedit.recording import Recording, RecordSession
from fisedit.runtime.cache.keys import KeysPlan
from fisedit.runtime.cache.tiers import Tiers
from fisedit.runtime.cache.writer import Writer
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.dense import CompiledModel
from fisedit.runtime.kernels import check_launches
from fisedit.runtime.packed_weights import Made
from fisedit.saving import load_recording, save_recording
from fisedit.warnings import DenseIslandsWarning, warn

Build = Callable[[nn.Module, Call, CompileConfig], Program]
NOT_CAPTURED = "Nothing is captured yet: the first call inside record() or edit() does it."
MANY_ISLANDS = 20
"""A model of which more ops than this stay dense is reported by a warning."""


class Session(Protocol):
    """What a ``with`` block does to the calls made inside it."""

    name: str

    def run(self, call: Call) -> Any: ...

    def close(self) -> None: ...


# Which session the calls of this thread or task belong to, by the identity of the model. A context variable, not a
# flag on the module: threads that edit at the same time do not see each other's.
_sessions: contextvars.ContextVar[dict[int, Session]] = contextvars.ContextVar("fisedit_sessions", default={})  # noqa: B039


def active_session(unet: CompiledUNet) -> Session | None:
    """The session of ``unet`` that is open in this thread or task."""
    return _sessions.get().get(id(unet))


def run_call(session: Session, call: Call) -> Any:
    """Run a call in a session. Its graphs hold the casts of autocast; it would cast again. Its GPU is the current one
    meanwhile: kernels are launched and graphs captured there, wherever their tensors lie."""
    with torch.cuda.device_of(call.tensors[call.sample]), torch.autocast(call.device_type, enabled=False):
        return session.run(call)


@dataclass(eq=False)
class _Live:
    """What changes of a compiled model: its graphs, the state they were made for, and whether a session is open."""

    fingerprinter: Fingerprinter = field(default_factory=Fingerprinter)
    programs: dict[tuple[nn.Module, Signature], Program] = field(default_factory=dict)
    packed: Made = field(default_factory=Made)
    tiers: dict[torch.device, Tiers] = field(default_factory=dict)
    keys_plan: KeysPlan | None = None
    state: ModelState | None = None
    sessions: int = 0
    in_session: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    dense: CompiledModel | None = None  # what runs calls outside sessions on a GPU; None: the original


class Maker:
    """Stands for a compiled model in its recordings, which do not keep it alive."""

    def __init__(self, unet: CompiledUNet) -> None:
        self._unet = weakref.ref(unet)

    def save(self, recording: Recording, folder: Path | str, overwrite: bool) -> None:
        """See :meth:`Recording.save`."""
        unet = self._unet()
        if unet is None:
            raise ModelGoneError(model=recording.model_name)
        save_recording(unet.identify("save"), recording, folder, overwrite)


class CompiledUNet(nn.Module):
    """A U-Net that can record and edit. Made by :func:`fisedit.compile`.

    It is the original in another class, one that is derived from the original's: both objects share all attributes
    (``vars``), so that parameters, ``config``, adapters, hooks and ``isinstance`` are the original's, whichever of the
    two is changed, and ``from_pretrained`` and the constructor make originals. Outside ``record`` and ``edit`` a call
    is the original's own, on a GPU compiled by Inductor (``CompileConfig.dense``). What is its own is in slots.
    """

    __slots__ = ("_unet", "compile_config", "cost_model", "_build", "_identity", "_live")
    _unet: nn.Module
    compile_config: CompileConfig
    cost_model: CostModel
    _build: Build
    _identity: Maker
    _live: _Live

    @staticmethod
    def of(unet: nn.Module, config: CompileConfig, build: Build) -> CompiledUNet:
        """Compile ``unet``; ``build`` makes the graphs of a call."""
        original: Any = type(unet)
        compiled: CompiledUNet = object.__new__(_class_for(original))
        given = config.dense == "eager" or isinstance(unet, OptimizedModule)  # the user compiled it, or wants none
        live = _Live(dense=None if given else CompiledModel(unet))
        own = {"_unet": unet, "compile_config": config, "cost_model": CostModel(config.cost), "_build": build,
               "_identity": Maker(compiled), "_live": live}  # fmt: skip
        for name, value in {"__dict__": vars(unet), **own}.items():
            object.__setattr__(compiled, name, value)
        return compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # An attribute before the context variable: torch.compile around this model guards on it, and so its graph of
        # the dense model is left, without a break, as soon as a session is open.
        if self._live.in_session:
            return self._call_in_session(args, kwargs)
        dense = self._live.dense
        if dense is not None and not torch.compiler.is_compiling() and dense.takes(args, kwargs):
            return dense(*with_timestep_tensor(self._dense, args, kwargs))
        return self._unet(*args, **kwargs)

    @torch.compiler.disable(reason="FISEdit's sessions run graphs of their own; compile without fullgraph=True")
    def _call_in_session(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = _sessions.get().get(id(self))
        if session is None:  # it is another thread's
            return self._unet(*args, **kwargs)
        hook = vars(self).get("_hf_hook")  # accelerate's: it brings the weights to where they are needed
        if hook is not None:
            args, kwargs = hook.pre_forward(self, *args, **kwargs)
        call = bind_call(self._dense, args, kwargs)
        result = run_call(session, call)
        return result if hook is None else hook.post_forward(self, result)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Run the calls inside the ``with`` block dense and keep their feature maps.

        Yields the :class:`Recording`; give its ``on_step_end`` to a diffusers pipeline for an exact background later.

        Raises:
            NestedSessionError: inside another ``record`` or ``edit`` of this model.
            UnsupportedCaptureError, UnsupportedDtypeError: at the first call, if the model cannot be captured.
            UnavailableProviderError: at the first call, if ``provider="triton"`` cannot launch kernels here.
        """
        state = self._weights()
        recording = self._new_recording(state)
        session = RecordSession(recording, self.program, self.tiers, self.compile_config.cache)
        with self._open(session, state):
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
            UnavailableProviderError: at the first call, as of :meth:`record`.
        """
        several = isinstance(base, (list, tuple))
        bases = list(base) if several else [base]
        each = [_for_each("mask", mask, bases, several), _for_each("alignment", alignment, bases, several)]
        config, state = detect or DetectConfig(), self._weights()
        edits = Edits(self._new_edit(b, m, a, config, record, state) for b, m, a in zip(bases, *each, strict=True))
        with ExitStack() as held:
            for edit in edits:
                held.enter_context(edit.base.held())
            with self._open(EditSession(edits, self.program, self.cost_model, self.tiers), state):
                yield edits if several else edits[0]
        for edit in edits:
            if edit.recording is not None:
                # An edit that ended before its mask was found mixes two runs: it cannot be edited in turn.
                edit.recording.latents, edit.recording.corrections = edit.latents, edit.corrections
                edit.recording.complete = edit.mask is not None
                edit.recording.compact()

    def load_recording(self, folder: Path | str, *, verify: bool = True) -> Recording:
        """A recording that ``recording.save(folder)`` or ``generation.save(folder)`` wrote, as this model's own.

        Feature maps stay in their files until an edit reads them; the files may be removed or replaced meanwhile, but
        must not be written to. For a GPU they are copied now, to the first tier with room (``CacheConfig``), and read
        from their files only where there is none.

        Args:
            verify: whether every file is read and its checksum compared; else only sizes are.

        Raises:
            SavedBaseMismatchError: another class, config or dtype, other weights (LoRA included), or ``kv="active"``,
                which keeps too little for another ``kv``.
            SavedBaseNotFoundError, UnfinishedSaveError: nothing was saved there, or not to the end.
            CacheReadError: names the file that is missing or damaged.
            SavedFormatError: a newer version of FISEdit saved it.
            NestedSessionError: inside ``record`` or ``edit`` of this model.
            UnreadableWeightsError: what tells this model from others cannot be found out.
        """
        return load_recording(self.identify("load_recording"), self.tiers, folder, verify)

    def identify(self, action: str) -> ModelIdentity:
        """What tells this model from others, for an ``action`` that saves or loads.

        Raises:
            NestedSessionError: a session of this model is open in this thread or task.
        """
        active = active_session(self)
        if active is not None:
            raise NestedSessionError(opened=action, active=active.name)
        state = self._weights()
        return ModelIdentity(self._dense, state, self._identity, self.model_name, self.compile_config.kv)

    def _new_edit(
        self, base: Recording, mask: Any, alignment: TokenAlignment | None, detect: DetectConfig, record: bool,
        state: ModelState,
    ) -> Edit:  # fmt: skip
        if not isinstance(base, Recording):
            raise UnknownOptionError(option="base", given=base, allowed="a recording that record() or edit() gave")
        base.check_editable(self._identity, lambda: self.model_name, state)
        if mask is not None:
            size = next(iter(base.calls.values())).sample.shape[-2:]
            mask = masks.user_mask(mask, (int(size[0]), int(size[1])))[None]
        recording = self._new_recording(state) if record else None
        if recording is not None and base.writer is not None:
            recording.writer = Writer(base.writer.tiers)
        return Edit(base, detect, recording, alignment, mask)

    def _new_recording(self, state: ModelState) -> Recording:
        return Recording(self._identity, self.model_name, state)

    def _weights(self) -> ModelState:
        """The model as it is now. Graphs made of it as it was before are dropped."""
        live = self._live
        with live.lock:
            now = live.fingerprinter.read(self._dense)
            if live.state is None or now != live.state.fingerprint:
                live.state = ModelState(now)
                live.programs.clear()
                live.packed = Made()
            return live.state

    @contextmanager
    def _open(self, session: Session, state: ModelState) -> Iterator[None]:
        """Let a session run the calls of this thread; ``state`` is the model's at its beginning."""
        active = _sessions.get()
        if id(self) in active:
            raise NestedSessionError(opened=session.name, active=active[id(self)].name)
        token = _sessions.set({**active, id(self): session})
        self._count_sessions(1)
        try:
            yield
        finally:
            _sessions.reset(token)
            self._count_sessions(-1)
            session.close()
        if changes := state.changes(self._weights()):
            raise ModelChangedError(session=session.name, changes=changes)

    def _count_sessions(self, change: int) -> None:
        with self._live.lock:
            self._live.sessions += change
            self._live.in_session = self._live.sessions > 0

    @property
    def _dense(self) -> nn.Module:
        """The model that is traced: the original, without ``torch.compile`` around it."""
        return self._unet._orig_mod if isinstance(self._unet, OptimizedModule) else self._unet

    def program(self, call: Call) -> Program:
        """The graphs for a call's signature, captured on the first such call.

        Raises:
            UnsupportedCaptureError: the model cannot be traced.
            UnsupportedDtypeError: half precision on a CPU.
            UnavailableProviderError: ``provider="triton"`` cannot launch kernels here.
        """
        sample = call.tensors[call.sample]
        check_launches(self.compile_config.provider, sample.device)
        if sample.dtype == torch.float16 and sample.device.type == "cpu":
            raise UnsupportedDtypeError(dtype="float16", device="cpu", supported=("float32", "bfloat16"))
        live, model = self._live, call.model or self._dense
        key = (model, call.signature)
        with live.lock:
            if key not in live.programs:
                state = self._weights()
                program = self._build(model, call, self.compile_config)
                program.packed = live.packed
                live.keys_plan = program.plan_keys(self.tiers(call.device), live.keys_plan)
                state.fingerprint = live.fingerprinter.read(self._dense)
                _warn_of_islands(program)
                live.programs[key] = program
            return live.programs[key]

    def tiers(self, device: torch.device) -> Tiers:
        """The memory for this model's recordings on a device: budgets, what lies where, what was moved."""
        with self._live.lock:
            if device not in self._live.tiers:
                self._live.tiers[device] = Tiers(self.compile_config.cache.budgets, device)
            return self._live.tiers[device]

    def inspect(self, kind: str = "edit") -> str:
        """The graphs captured so far as text, with what each pass did and every op that stays dense."""
        dense = self._live.dense
        lines = [f"compiled by Inductor: {dense.compilation}"] if dense is not None and dense.compilation.used else []
        if not self._live.programs:
            lines.append(NOT_CAPTURED)
        return "\n\n".join([*lines, *(program.inspect(kind) for program in self._live.programs.values())])

    def explain(self, mask: Any) -> str:
        """How an edit under ``mask`` is computed, for each call captured so far: sparse or dense, and layer by layer
        what the cost model chooses and what the candidates cost.

        Raises:
            InvalidMaskError: see :meth:`edit`.
        """
        texts = []
        for program in self._live.programs.values():
            height, width = program.captured.signature.tensors[0][1][-2:]
            texts.append(explain(program, masks.user_mask(mask, (height, width)), self.cost_model))
        return "\n\n".join(texts) or NOT_CAPTURED

    @property
    def model_name(self) -> str:
        parameters = sum(p.numel() for p in self._unet.parameters())
        return f"{type(self._unet).__name__} with {parameters / 1e6:.1f} M parameters"

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledUNet:
        """A copy of the model with weights of its own, which captures anew; recordings of this one are not its."""
        return CompiledUNet.of(copy.deepcopy(self._unet, memo), self.compile_config, self._build)

    def __copy__(self) -> CompiledUNet:
        """Another compiled model over a shallow copy of the original, as ``copy.copy`` makes it of modules."""
        return CompiledUNet.of(copy.copy(self._unet), self.compile_config, self._build)

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledUNet.of, (self._unet, self.compile_config, self._build)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def _get_name(self) -> str:
        return f"{type(self._unet).__name__}, compiled by fisedit"

    if TYPE_CHECKING:  # what else is the original's

        def __getattr__(self, name: str) -> Any: ...


@functools.cache
def _class_for(original: Any) -> type[CompiledUNet]:
    """The class of compiled models that are also an ``original``, under the original's name."""

    def new(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
        return original(*args, **kwargs)

    body = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__new__": new}
    return types.new_class(original.__name__, (CompiledUNet, original), {}, lambda namespace: namespace.update(body))


def _warn_of_islands(program: Program) -> None:
    program.executable("edit")
    islands = program.islands
    if len(islands) > MANY_ISLANDS:
        warn(
            f"{len(islands)} ops of the model stay dense while editing, the first in {islands[0]}. An edit will gain "
            "little. If attention is sliced, undo that (pipe.disable_attention_slicing()); inspect() names the rest.",
            DenseIslandsWarning,
        )


def _for_each(option: str, given: Any, bases: list[Recording], several: bool) -> list[Any]:
    """An option of one edit, or of each of several."""
    if not several or given is None:
        return [given] * len(bases)
    if not isinstance(given, (list, tuple)) or len(given) != len(bases):
        raise UnknownOptionError(option=option, given=given, allowed=f"a list of {len(bases)}, one for each base")
    return list(given)
