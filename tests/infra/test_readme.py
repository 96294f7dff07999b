"""The files that infra/README.md names exist, and the example recipe is valid.

That the commands and options it names exist is tested for all pages in tests/test_docs.py.
"""

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
    here = [path for path in (root / "infra").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    here.remove(root / "infra/README.md")
    assert not [path.name for path in here if path.name not in readme and f"{path.parent.name}/`" not in readme]
    named = re.findall(r"\binfra/[\w./-]+\.(?:yaml|sbatch)|\binfra/image/Dockerfile", readme)
    assert named
    assert not [name for name in named if not (root / name).is_file()]


def test_every_variable_of_the_slurm_script_is_described_at_its_top(root):
    text = (root / "infra/slurm/extract.sbatch").read_text()
    top, _, body = text.partition("set -euo pipefail")
    assert set(re.findall(r"\bSCSAE_\w+", body)) == set(re.findall(r"(?m)^# (SCSAE_\w+)", top))
