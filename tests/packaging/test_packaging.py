"""What is installed, what an import costs, and what the public face is."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import loraforge

ROOT = Path(__file__).parents[2]


def test_the_wheel_installs_three_packages_and_nothing_else(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"loraforge", "loraforge_registry", "loraforge_cli", f"loraforge-{loraforge.__version__}.dist-info"}
    assert {f"{top}/py.typed" for top in ("loraforge", "loraforge_registry", "loraforge_cli")} <= set(names)


def test_the_version_is_said_once_in_effect():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == loraforge.__version__


def test_every_public_name_arrives():
    assert loraforge.__all__ == sorted(loraforge.__all__, key=lambda name: (not name.isupper(), name.islower(), name))
    for name in loraforge.__all__:
        assert getattr(loraforge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = loraforge.nonsense


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ls"], ["push", "--help"], ["show", "--help"], ["compose", "--help"]], ids=" ".join
)
def test_a_command_that_computes_nothing_imports_no_torch(arguments, tmp_path):
    script = (
        "import sys\n"
        f"sys.argv = ['loraforge', *{arguments!r}]\n"
        "from loraforge_cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'huggingface_hub', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_import_loraforge_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, loraforge; assert 'torch' not in sys.modules"], check=True)


def test_every_version_is_pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert "torch==2.13.0" in lines
