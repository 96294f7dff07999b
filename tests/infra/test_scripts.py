"""bash and its linter find nothing in the scripts of infra/."""

import shutil
import subprocess
import sysconfig

import pytest

SCRIPTS = ("gpu/check.sh", "slurm/extract.sbatch")


def test_every_script_is_checked(root):
    infra = root / "infra"
    found = [path.relative_to(infra) for path in infra.rglob("*") if path.suffix in {".sh", ".sbatch"}]
    assert sorted(map(str, found)) == sorted(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_and_the_linter_find_nothing(root, name):
    script = root / "infra" / name
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts"))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install -e '.[dev]'")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
