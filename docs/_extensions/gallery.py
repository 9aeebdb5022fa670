"""Runs examples while the pages that show them are built: a directive with picture and output.

In a page, this runs `main` of `examples/digits.py` and shows what it draws and what it prints:

    ```{example} digits
    :arguments: num_steps=100
    :alt: what the picture shows
    ```

Figure and output are kept in `docs/_build/gallery`, and made anew only when the example, the
package, the arguments or JAX change. With `-D run_examples=0` none is run, and a page says so where
nothing fitting is kept. An example that fails is a warning, which fails the build.
"""

import ast
import hashlib
import os
import subprocess
import sys
import tempfile
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "_build" / "gallery"
LONGEST = 600.0  # seconds that an example may take on a busy machine
PROGRAM = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
importlib.import_module(sys.argv[2]).main(sys.argv[3], **eval(sys.argv[4]))
"""


def arguments_of(text: str) -> dict[str, Any]:
    """The keyword arguments that `a=1, b="c"` stands for."""
    call = ast.parse(f"main({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def state_of(source: Path, arguments: dict[str, Any]) -> str:
    """A hash of all that figure and output depend on."""
    state = hashlib.sha256(repr((sorted(arguments.items()), version("jax"))).encode())
    for file in [source, *sorted((ROOT / "src").rglob("*.py"))]:
        state.update(file.read_bytes())
    return state.hexdigest()


def run(source: Path, arguments: dict[str, Any], figure: Path, output: Path, state: str) -> str:
    """Runs an example, keeps its figure and output; what went wrong, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / figure.name
        command = [sys.executable, "-c", PROGRAM]
        command += [str(source.parent), source.stem, str(drawn), repr(arguments)]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=LONGEST, check=False
            )
        except subprocess.TimeoutExpired:
            return f"it did not end within {LONGEST} seconds"
        if done.returncode or not drawn.exists():
            return done.stderr or "no figure was drawn"
        lines = [line for line in done.stdout.splitlines() if not line.startswith("Figure: ")]
        figure.parent.mkdir(parents=True, exist_ok=True)
        # The state comes last, each file at once: an interrupted build leaves no mixture.
        output.unlink(missing_ok=True)
        for path, contents in (
            (figure, drawn.read_bytes()),
            (output, "\n".join([state, textwrap.dedent("\n".join(lines))]).encode()),
        ):
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(contents)
            unfinished.replace(path)
    return ""


class Example(SphinxDirective):
    """The directive."""

    required_arguments = 1
    option_spec = {  # noqa: RUF012 - as docutils has it
        "arguments": directives.unchanged,
        "alt": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        """Figure and output, as nodes of the page."""
        name = self.arguments[0]
        source = ROOT / "examples" / f"{name}.py"
        self.env.note_dependency(str(source))
        for file in (ROOT / "src").rglob("*.py"):
            self.env.note_dependency(str(file))
        arguments = arguments_of(self.options.get("arguments", ""))
        figure, output = KEPT / f"{name}.png", KEPT / f"{name}.txt"
        state = state_of(source, arguments)
        kept = output.exists() and output.read_text().split("\n", 1)[0] == state
        if not kept and not self.config.run_examples:
            return [nodes.paragraph(text="(This build did not run the example.)")]
        if not kept:
            LOGGER.info("running examples/%s.py", name)
            trouble = run(source, arguments, figure, output, state)
            if trouble:
                LOGGER.warning("%s failed: %s", source.name, trouble, location=self.get_location())
                return []
        printed = output.read_text().split("\n", 1)[1].rstrip("\n")
        image = nodes.image(uri=f"/_build/gallery/{name}.png", alt=self.options.get("alt", name))
        block = nodes.literal_block(printed, printed, language="text")
        return [image, block]


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    app.add_config_value("run_examples", True, "env")
    app.add_directive("example", Example)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
