"""The child process of `cuda_emulator.run`."""

from . import serve

serve()
