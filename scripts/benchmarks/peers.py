"""Other trainers beside ours: which there are, how to get them, and their rows from own processes.

Optional, and never imported here: each runs in a process of its own, which leaves the GPU empty for
the next one. torchtitan needs that for its import name, which is ours too.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError, suggest

SCRIPTS = Path(__file__).parents[1]
HOW_TO_GET = {
    "transformers": "pip install transformers",
    "transformers+liger": "pip install transformers liger-kernel (needs a GPU)",
    "torchtitan": "pip install --no-deps --target FOLDER torchtitan==0.2.2, then give "
    "--torchtitan_site FOLDER",
}


def check_peers(names: list[str], torchtitan_site: Path | None) -> None:
    """Raise `UserError` for peers that we don't know and a site folder without torchtitan."""
    for name in names:
        if name not in HOW_TO_GET:
            raise UserError(f"--peers: '{name}' is no peer{suggest(name, HOW_TO_GET)}")
    # The record of an installation: this repository has a folder torchtitan, too.
    if torchtitan_site and not list(torchtitan_site.glob("torchtitan-*.dist-info")):
        raise UserError(
            f"--torchtitan_site {torchtitan_site} holds no torchtitan: make it by "
            "pip install --no-deps --target FOLDER torchtitan==0.2.2."
        )


def run_peer(
    name: str, settings: dict[str, Any], *, torchtitan_site: Path | None, seconds: float
) -> dict[str, Any]:
    """Return the peer's row, {name, missing: why, and how to get it}, or {name, failed: its last
    output}."""
    if name == "torchtitan" and torchtitan_site is None:
        return {"name": name, "missing": f"not installed: {HOW_TO_GET[name]}"}
    # Our own package comes last: one peer has its name.
    path = [str(SCRIPTS), os.environ.get("PYTHONPATH", ""), str(SCRIPTS.parent)]
    if name == "torchtitan" and torchtitan_site is not None:
        path.insert(1, str(torchtitan_site.resolve()))
    with tempfile.TemporaryDirectory() as folder:
        told, answer = Path(folder, "settings.json"), Path(folder, "row.json")
        told.write_text(json.dumps(settings))
        # -P: the working folder is no place for imports, or the package beside it would be taken.
        command = [sys.executable, "-P", "-m", "benchmarks.peer_step", name, told, answer]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        if "MASTER_PORT" in env:  # the ranks of the peer meet elsewhere than ours did
            port = int(env["MASTER_PORT"]) + 1 + list(HOW_TO_GET).index(name)
            env |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"name": name, "failed": f"took longer than {seconds:.0f} s"}
        if answer.exists():
            row = json.loads(answer.read_text())
            if "missing" in row:
                row["missing"] += f": {HOW_TO_GET[name]}"
            return row
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        return {"name": name, "failed": f"exit code {done.returncode}: {words[-1][:300]}"}
