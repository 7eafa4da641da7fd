"""A torchtitan-style trainer for DeepSeek-V3-like mixture-of-experts models."""

__version__ = "0.1.0"
