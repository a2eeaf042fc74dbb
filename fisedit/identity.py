"""What tells a model from others in another process: its class, config, and the values of all its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisedit.errors import SavedBaseMismatchError, UnreadableWeightsError
from fisedit.fingerprint import ModelState
from fisedit.recording import Owner, Recording


@dataclass
class ModelIdentity:
    """A compiled model as it is now, for saving its recordings and loading them.

    Attributes:
        model: the original. state: as it was found. owner: whom its recordings belong to. name: for messages.
        kv: how edits see the keys and values of self-attention, which ``"active"`` does not record.
    """

    model: nn.Module
    state: ModelState
    owner: Owner
    name: str
    kv: str

    def check_savable(self, recording: Recording) -> None:
        """Raise unless a recording is this model's, as it is now, and whole.

        Raises:
            ForeignRecordingError, SessionClosedError, PartialRecordingError, IncompleteRecordingError.
        """
        recording.check_editable(self.owner, lambda: self.name, self.state)

    def facts(self, recording: Recording) -> dict[str, Any]:
        """What tells the model from others, and whether a recording of it has keys and values, as JSON values."""
        kept = {call.kv for call in recording.calls.values()}
        kv = "active" if "active" in kept else "cached"
        return {**self._description(), "weights": self.weights, "kv": kv}

    def check(self, folder: str, saved: Mapping[str, Any]) -> None:
        """Raise unless these :meth:`facts` are this model's. Weights are read last, and not if all else differs.

        Raises:
            SavedBaseMismatchError: names what differs.
        """
        here = self._description()
        differences = {name: (saved[name], here[name]) for name in ("class", "dtype") if saved[name] != here[name]}
        if saved["kv"] == "active" and self.kv not in ("active", "auto"):  # else all is there, in 8 bits or not
            differences["kv"] = (saved["kv"], self.kv)
        # A key that only one of them has came with another version of the library, with its default.
        config, own = saved["config"], here["config"]
        differences |= {f"config.{k}": (config[k], own[k]) for k in config if k in own and config[k] != own[k]}
        if not differences and saved["weights"] != self.weights:
            differences["weights (SHA-256)"] = (saved["weights"], self.weights)
        if differences:
            raise SavedBaseMismatchError(folder=folder, differences=differences)

    @property
    def weights(self) -> str:
        """The hash of the weights, computed once for a state of the model; see :func:`hash_weights`."""
        if self.state.weights is None:
            self.state.weights = hash_weights(self.model)
        return self.state.weights

    @property
    def device(self) -> torch.device:
        """Where its calls run."""
        hook = vars(self.model).get("_hf_hook")  # accelerate's: it brings the weights to where they are needed
        wanted = getattr(hook, "execution_device", None)
        if wanted is None:
            return next(self.model.parameters()).device
        return torch.empty(0, device=wanted).device

    def _description(self) -> dict[str, Any]:
        dtypes = {str(p.dtype).removeprefix("torch.") for p in self.model.parameters() if p.is_floating_point()}
        config = _plain_config(getattr(self.model, "config", None))
        return {"class": type(self.model).__name__, "config": config, "dtype": "+".join(sorted(dtypes))}


def hash_weights(model: nn.Module) -> str:
    """The SHA-256 of all parameters and buffers: names, dtypes, shapes and values, wherever and however they lie.

    Raises:
        UnreadableWeightsError: values are offloaded to where they cannot be read, or packed by another library.
    """
    tensors = dict(sorted([*model.named_parameters(), *model.named_buffers()]))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda item: _hash_tensor(*item), tensors.items()))
    whole = hashlib.sha256()
    for (name, tensor), digest in zip(tensors.items(), digests, strict=True):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)} {digest}\n".encode())
    return whole.hexdigest()


def _hash_tensor(name: str, tensor: Tensor) -> str:
    try:
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    except (RuntimeError, NotImplementedError, TypeError) as error:  # as many as there are kinds of tensors
        reason = "they are on the meta device" if tensor.is_meta else str(error).splitlines()[0]
        raise UnreadableWeightsError(name=name, reason=reason) from error
    return hashlib.sha256(values).hexdigest()


def _plain_config(config: Any) -> dict[str, Any]:
    """A model's config as JSON values, without what says where it came from; empty if it has none."""
    items = dict(config) if isinstance(config, Mapping) else dict(getattr(config, "__dict__", {}))
    plain = {}
    for name, value in items.items():
        if not str(name).startswith("_") and (text := _json(value)) is not None:
            plain[str(name)] = json.loads(text)
    return plain


def _json(value: Any) -> str | None:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return None
