"""Is a checkpoint fit to resume from? `python3 tests/test_resume.py [CHECKPOINT]`; without one, the newest in outputs/.

The same as `python -m training.verify`. Under pytest, the script is run on good and bad checkpoints.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.verify import newest_under, verify_and_tell  # noqa: E402


def main(argv: list[str]) -> int:
    checkpoint = Path(argv[0]) if argv else newest_under(Path("outputs"))
    if checkpoint is None:
        print("✗ no checkpoint under outputs/: give one, e.g. python3 tests/test_resume.py outputs/mine/step_300")
        return 1
    print(checkpoint)
    return 0 if verify_and_tell(checkpoint) else 1


def script(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(Path(__file__)), *argv], capture_output=True, text=True, cwd=cwd)


def test_the_script_passes_a_good_checkpoint_and_finds_the_newest(a_run, tmp_path):
    done = script(str(a_run / "step_3"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "✓ Checkpoint loaded successfully" in lines and "✓ Model state loaded successfully" in lines
    assert lines[-1] == "✓ All checkpoint resume tests passed!"
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run").symlink_to(a_run)
    done = script(cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[0].endswith("step_6")


def test_the_script_says_what_is_wrong(tmp_path):
    done = script(str(tmp_path / "step_3"))
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("✗") and "Traceback" not in done.stderr
    done = script(cwd=tmp_path)
    assert done.returncode == 1 and "no checkpoint under outputs/" in done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
