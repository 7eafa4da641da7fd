"""Pure tensor functions: no module, no process group, no configuration."""
