"""The `packedbert` command. Heavy imports stay inside the commands, so that --help is quick."""

import warnings
from typing import Any

import click

from .. import __version__
from . import answer, demo, look, make, speed
from .common import say


class Group(click.Group):
    """A group whose commands end in one line on stderr and exit status 1 where they fail."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; --debug lets tracebacks through."""
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"packedbert: {message}", "yellow")
            try:
                return super().invoke(ctx)
            except (click.exceptions.Exit, click.Abort, click.ClickException, BrokenPipeError):
                raise  # click prints these, or ends quietly
            except Exception as error:
                if ctx.params.get("debug"):
                    raise
                expected = isinstance(error, ValueError | TypeError | OSError | RuntimeError | IndexError | ImportError)
                text = str(error) if expected else f"{type(error).__name__}: {error} (a bug? --debug shows where)"
                say(f"packedbert: {text}", "red")
                ctx.exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="packedbert")
def main(debug: bool) -> None:
    """Run structurally pruned BERTs as fast as the weights that are left allow.

    \b
    packedbert demo                                    what it does, in half a minute, offline
    packedbert qa --model DIR -q "Who?" -c "..."       answer a question
    packedbert inspect DIR                             what is left of a checkpoint
    packedbert report DIR -o report.html               the same as a page, with pictures
    packedbert eval --model DIR --data dev.json.gz     exact match and F1 on SQuAD
    packedbert prune --model DIR --data F -o DIR       make a dense model faster
    packedbert bench                                   dense, packed eager and patched, side by side
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()


for command in (
    demo.demo,
    answer.qa,
    look.inspect,
    look.report,
    make.prune,
    answer.evaluate,
    speed.bench,
    look.backends,
):
    main.add_command(command)
