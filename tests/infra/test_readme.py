"""What infra/README.md and the example recipe say, against the files, the command line and the options there are."""

import re

import pytest

from pipelines.config import load_recipe
from pipelines.runtime.job_submission import refuse_relative


@pytest.fixture
def readme(root):
    return (root / "infra/README.md").read_text()


def test_the_example_recipe_is_valid_and_can_be_submitted_as_it_is(root):
    recipe = load_recipe(root / "infra/recipe.yaml")
    assert recipe.store is not None
    refuse_relative(recipe, str(recipe.store))


def test_every_file_here_is_in_the_readme_and_every_file_it_names_is_here(root, readme):
    here = [path for path in (root / "infra").rglob("*") if path.is_file() and path.name != "README.md"]
    assert not [path.name for path in here if path.name not in readme and f"{path.parent.name}/`" not in readme]
    named = re.findall(r"\binfra/[\w./-]+\.(?:yaml|sbatch)|\binfra/image/Dockerfile", readme)
    assert named
    assert not [name for name in named if not (root / name).is_file()]


def test_every_option_of_scsae_that_it_names_exists(readme):
    import typer.main

    from pipelines.cli import app

    commands = typer.main.get_command(app).commands
    known = {option for name in ("submit", "run") for parameter in commands[name].params for option in parameter.opts}
    said = set(re.findall(r"--(?:address|store|env|no-wait)\b", readme))
    assert said == {"--address", "--store", "--env", "--no-wait"}
    assert said <= known


def test_every_variable_of_the_slurm_script_is_described_at_its_top(root):
    text = (root / "infra/slurm/extract.sbatch").read_text()
    top, _, body = text.partition("set -euo pipefail")
    assert set(re.findall(r"\bSCSAE_\w+", body)) == set(re.findall(r"(?m)^# (SCSAE_\w+)", top))
