"""FP8 training in DeepSeek-V3's recipe: numbers, kernels for Hopper, their emulation, products."""
