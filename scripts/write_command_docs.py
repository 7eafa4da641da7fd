"""Write docs/commands.md: every command with its purpose and its options.

    python scripts/write_command_docs.py

The page comes from the scripts themselves: their docstrings, and the parsers that print `--help`. A
test fails where it is stale.
"""

import argparse
import ast
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock, patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

PAGE = entry.REPO / "docs/commands.md"
SCRIPTS = entry.REPO / "scripts"
HEAD = """\
# Every command

Written by `python scripts/write_command_docs.py` from the scripts and their parsers; do not edit
it. The scripts take `--help` and `--version`, run from any folder, and end with a sentence instead
of a traceback: exit code 0 done, 1 failed, 2 the caller's mistake, 130 Ctrl-C.

## Training

```bash
./run_train.sh                            # the debug model, on all GPUs or two CPU processes
NGPU=8 CONFIG_FILE=train_configs/deepseek_v3_16b.toml ./run_train.sh --training.steps 100
LOG_RANK=0,1 ./run_train.sh               # shows the log lines of two ranks
COMM_MODE=fake_backend NGPU=256 ./run_train.sh --training.steps 1      # dry run of rank 0 of 256
python -m torchtitan.train --job.config_file X.toml --section.key value      # without the script
python -m torchtitan.train --job.config_file X.toml --job.check_config       # only: does it fit?
python -m torchtitan.train --help         # every key with its sentence, as in docs/config.md
```

The command line overrides the TOML file, which overrides the defaults ([config.md](config.md)). Any
model argument can be set in either:

```toml
[model]
flavor = "debugmodel"       # 16B, 236B, 671B, Moonlight-16B-A3B, Kimi-K2; of qwen3 30B-A3B, ...

[model.args]
n_layers = 4
attn_mask_type = "block_causal"   # tokens see their own document only

[model.args.moe_args]
num_experts = 16
num_expert_groups = 4       # node-limited routing: experts of a token's
num_limited_groups = 2      # two best groups only
```

A wrong key, value or combination ends the run at once, with one sentence and exit code 2. When
training itself fails (a loss that is not finite), the exit code is 1. Signals and their exit codes:
[checkpoint.md](checkpoint.md).

**Completion.** `source <(python scripts/completion.py bash)` completes every key of `run_train.sh`,
and its values where they are choices (or `zsh`; the output can be kept in a file).
"""
# For users of the package, in the order of a project; all others are for work on it.
FOR_USERS = """\
run_train.sh plan.py prove.py download_hf_assets.py show_batch.py report.py generate.py
explain_hang.py checkpoint_conversion/convert_from_hf.py checkpoint_conversion/convert_to_hf.py
completion.py launch.py
""".split()
# Called by other scripts only.
INTERNAL = {"check_dependencies.py", "node_traffic_rank.py", "benchmarks/peer_step.py"}
# The first one's options are torchrun's; the other takes one path.
WITHOUT_PARSER = {"launch.py", "plot_losses.py"}
# What only pictures need; the parsers are there without it.
OPTIONAL = ("matplotlib", "matplotlib.pyplot", "matplotlib.axes")


class _Found(BaseException):
    """Carries the parser of a script out of it."""


def parser_of(script: Path) -> argparse.ArgumentParser:
    """Run a script up to the point where it parses its options."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Found(parser)

    kept = sys.argv, sys.path[:], signal.getsignal(signal.SIGINT)
    sys.argv = [str(script), "--help"]
    sys.path.insert(0, str(script.parent))  # as for a script that is called
    stand_ins = {name: MagicMock() for name in OPTIONAL if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        # parse_args calls it, too
        with patch.object(argparse.ArgumentParser, "parse_known_args", stop):
            runpy.run_path(str(script), run_name="__main__")
    except _Found as found:
        return found.args[0]
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.argv, sys.path[:] = kept[:2]
        signal.signal(signal.SIGINT, kept[2])
    raise AssertionError(f"{script} ends without parsing its options")


def rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the lines of a Markdown table of a parser's arguments, then those of its commands."""
    options = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    options = [action for action in options if not isinstance(action, argparse._HelpAction)]
    if options:
        yield from ("", "| argument | meaning |", "|---|---|")
    for action in options:
        cells = f"`{_spelling(action)}`", _meaning(action)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                about = next((c.help for c in action._choices_actions if c.dest == name), None)
                yield from ("", f"`{name}`: {about or command.description}")
                yield from rows(command)


def _spelling(action: argparse.Action) -> str:
    value = action.metavar or (action.option_strings and action.dest.upper()) or action.dest
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs == 0:
        value = ""
    if action.nargs in ("+", "*"):
        value = f"{value} ..."
    names = [name for name in action.option_strings if name.startswith("--")]
    return f"{', '.join(names or action.option_strings)} {value}".strip()


def _meaning(action: argparse.Action) -> str:
    """The help text, with the default where it doesn't say one."""
    text = (action.help or "") % {"default": action.default, "prog": ""}
    default = action.default
    if (
        default in (None, False, [], argparse.SUPPRESS)
        or "default" in text
        or f"({default}" in text
    ):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{text} (default: {shown})".strip()


def comment_at_the_top(script: Path) -> str:
    """Return the first block of comments of a shell script."""
    lines = script.read_text().splitlines()[1:]
    count = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count])


def docstring(script: Path) -> str:
    return ast.get_docstring(ast.parse(script.read_text())) or ""


def section(name: str) -> Iterator[str]:
    """Yield the lines about a command. name: relative to scripts/; run_train.sh is above it."""
    script = entry.REPO / name if name == "run_train.sh" else SCRIPTS / name
    shown = script.relative_to(entry.REPO)
    is_shell = script.suffix == ".sh"
    about = comment_at_the_top(script) if is_shell else docstring(script)
    yield from ("", f"### {shown}", "", "```text", about, "```")
    if not is_shell and name not in WITHOUT_PARSER:
        yield from rows(parser_of(script))


def names() -> list[str]:
    """List the commands below scripts/, relative to it."""
    found = [p for p in SCRIPTS.rglob("*.py") if '__name__ == "__main__"' in p.read_text()]
    return sorted({str(p.relative_to(SCRIPTS)) for p in found} - INTERNAL) + ["test.sh"]


def page() -> str:
    lines = [HEAD.strip(), "", "## For users"]
    for name in FOR_USERS:
        lines += section(name)
    lines += ["", "## For work on the package"]
    for name in names():
        lines += section(name) if name not in FOR_USERS else []
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=entry.about(__doc__)).parse_args()
    PAGE.write_text(page())


if __name__ == "__main__":
    entry.run(main)
