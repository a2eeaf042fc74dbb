"""FISEdit: edit a generated image by changing words, and compute only the region that the words touch."""

from fisedit.api import compile
from fisedit.backend import edit, load_recording, record
from fisedit.config import CacheConfig, CompileConfig, DetectConfig
from fisedit.edit import Edit, Edits
from fisedit.errors import FISEditError
from fisedit.module import CompiledUNet
from fisedit.pipeline import EditPipeline, EditResult, Generation
from fisedit.recording import Recording
from fisedit.tracing import trace
from fisedit.warnings import FISEditWarning

__all__ = [
    "CacheConfig",
    "CompileConfig",
    "CompiledUNet",
    "DetectConfig",
    "Edit",
    "EditPipeline",
    "EditResult",
    "Edits",
    "FISEditError",
    "FISEditWarning",
    "Generation",
    "Recording",
    "compile",
    "edit",
    "load_recording",
    "record",
    "trace",
]
