"""What the tests of the config share: a TOML file of one's own."""

import pytest


@pytest.fixture
def toml(tmp_path):
    """Writes a TOML file and gives the option that names it."""

    def write(text: str | bytes, name: str = "run.toml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"--job.config_file={path}"

    return write
