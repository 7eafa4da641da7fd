# Triton comes with torch's CUDA builds only; its kernels are not Python to a type checker.
from typing import Any

from triton import language as language

def __getattr__(name: str) -> Any: ...
