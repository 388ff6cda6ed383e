"""Sessions that need a virtual environment of their own: `nox -s oracle`, `nox -s transformers`, `nox -s tests`."""

import nox

nox.options.sessions = ["tests"]

#: The oldest and the newest transformers that are tested.
TRANSFORMERS = ("5.0.0", "5.23.0")


def install(session: nox.Session, *more: str) -> None:
    """torch's floor first: a range would take the newest build, with gigabytes of CUDA packages."""
    session.install("torch==2.13.0", ".[test]", *more)


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite, as CI runs it."""
    install(session)
    session.run("pytest", *session.posargs)


@nox.session
@nox.parametrize("version", TRANSFORMERS)
def transformers(session: nox.Session, version: str) -> None:
    """The suite on one version of transformers."""
    session.install("torch==2.13.0")
    session.install(f"transformers=={version}", ".[report]", "pytest", "hypothesis", "ninja", "setuptools>=77")
    session.run("pytest", *session.posargs)


@nox.session
def oracle(session: nox.Session) -> None:
    """Compare with what the seed model ran on: transformers 4.57.6 and nn_pruning 0.1.2, in a venv of their own."""
    folder = session.create_tmp()
    session.run("python", "-m", "venv", f"{folder}/oracle", external=True)
    pip = f"{folder}/oracle/bin/pip"
    session.run(pip, "install", "torch==2.13.0", external=True)
    session.run(pip, "install", "transformers==4.57.6", "nn_pruning==0.1.2", external=True)
    install(session)
    session.env["PACKEDBERT_ORACLE_PYTHON"] = f"{folder}/oracle/bin/python"
    session.run("pytest", "-m", "oracle", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
