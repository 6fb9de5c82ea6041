"""How packed weights are multiplied. Knows tensors only: no files, no ComfyUI.

call.py        Call, Choice and the Backend protocol
dispatch.py    which backend multiplies a call, and why the others do not
contest.py     which of two is faster for a card and a shape; choices.py keeps that in a file
custom_op.py   the product as an operator of torch: `linear`, for everyone outside
eager.py       the reference; cpu.py, triton/, unpack/: the fast ones
machine.py     what this processor is fast at; threads.py says when torch's number of threads is a bad one
winograd.py    convolutions of a VAE on a CPU; nothing packed
"""

from ..weights.device_errors import is_the_devices
from .call import EXACT, MODES, Call, Choice, call_of, check_mode
from .contest import told as timed_choices
from .custom_op import linear
from .dispatch import (
    backend_names,
    forget_failures,
    keep_memory,
    keeping_memory,
    kept_bytes,
    release_memory,
    resolve,
    use_backend,
)
from .failure import BackendError, LostDeviceError
from .machine import capturing, cpu_has_fast_bf16
from .threads import tell_threads, threads_told

__all__ = [
    "EXACT",
    "MODES",
    "BackendError",
    "Call",
    "Choice",
    "LostDeviceError",
    "backend_names",
    "call_of",
    "capturing",
    "check_mode",
    "cpu_has_fast_bf16",
    "forget_failures",
    "is_the_devices",
    "keep_memory",
    "keeping_memory",
    "kept_bytes",
    "linear",
    "release_memory",
    "resolve",
    "tell_threads",
    "threads_told",
    "timed_choices",
    "use_backend",
]
