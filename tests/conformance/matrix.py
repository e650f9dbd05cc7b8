"""Load what we write with every PEFT we claim: ``make matrix`` (needs the package index; about five minutes).

Each golden adapter of tests/vectors/peft is loaded and saved by loraforge, then loaded by each PEFT version twice: as
PEFT wrote it, and as we did. Tensors and delta weights must be equal bit for bit, with no key missing. A case that a
version cannot load in PEFT's own writing is passed over, and counted.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

# PEFT version: the transformers it needs, where the one installed here is too new
VERSIONS = {"0.14.0": "4.48.3", "0.15.2": "4.51.3", "0.16.0": "4.51.3", "0.18.1": None, "0.20.0": None, "0.21.2": None}
OF_ITS_TIME = ["tokenizers<0.22", "huggingface-hub<1", "requests", "urllib3", "charset-normalizer", "certifi"]
VECTORS = Path(__file__).parents[1] / "vectors" / "peft"
WRITERS = ("0.14.0", "0.21.2")
REFUSED = {"mha", "target_parameters"}
# PEFT 0.14 cannot tell a target from a longer path that ends in it.
KNOWN = {("0.14.0", "patterns")}


def main() -> int:
    import loraforge as lf

    with tempfile.TemporaryDirectory() as folder:
        for golden in (path for writer in WRITERS for path in sorted((VECTORS / writer).iterdir())):
            if golden.name not in REFUSED:
                lf.save(lf.load(golden), Path(folder) / golden.parent.name / golden.name)
        results = [_in_version(version, needed, Path(folder)) for version, needed in VERSIONS.items()]
    return max(results)


def _in_version(version: str, transformers: str | None, folder: Path) -> int:
    """Run ``check`` in this Python with another PEFT in front."""
    packages = [f"peft=={version}", *([f"transformers=={transformers}"] if transformers else [])]
    extra = OF_ITS_TIME if transformers else []
    target = folder / f"peft-{version}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *packages, *extra]
    subprocess.run(pip, check=True)
    environment = {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=False).returncode


def check(folder: Path) -> int:
    """Compare both writings under the PEFT that is installed."""
    sys.path.insert(0, str(VECTORS))
    import make
    import peft

    make.say = lambda *_: None  # a delta that PEFT does not define is no news here
    cases = make.CASES

    equal = passed_over = wrong = 0
    for writer in WRITERS:
        for name in (name for name in cases if (folder / writer / name).exists()):
            theirs = _loaded(cases[name], VECTORS / writer / name)
            ours = _loaded(cases[name], folder / writer / name)
            if isinstance(theirs, str) or (peft.__version__, name) in KNOWN:
                passed_over += 1
            elif isinstance(ours, str) or not _same(theirs, ours):
                wrong += 1
                sys.stdout.write(f"  {writer} {name}: {ours if isinstance(ours, str) else 'differs'}\n")
            else:
                equal += 1
    sys.stdout.write(f"PEFT {peft.__version__}: {equal} equal, {passed_over} passed over, {wrong} wrong\n")
    return int(wrong > 0 or equal == 0)


def _loaded(case, folder):
    """The adapter's tensors and deltas once PEFT has loaded it, or why it did not."""
    from make import deltas, fill
    from peft import PeftModel, get_peft_model_state_dict

    base = case.build()
    fill(base.named_parameters())
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    missing = [str(w.message)[:100] for w in caught if "missing" in str(w.message).lower()]
    return missing[0] if missing else {**deltas(model), **get_peft_model_state_dict(model)}


def _same(theirs, ours):
    import torch

    return theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)


if __name__ == "__main__":
    sys.exit(check(Path(sys.argv[1])) if len(sys.argv) > 1 else main())
