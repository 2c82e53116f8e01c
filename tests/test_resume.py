"""Checks whether a run can resume from a checkpoint: `python3 tests/test_resume.py [CHECKPOINT] [--config YAML]`

Without a checkpoint, the newest under outputs/ is checked. --config: the run's yaml, which a legacy checkpoint may need.
The checks are those of `python -m training.verify`. Exit codes: 0 good; 1 not good, or none found. Under pytest, the
script is run on good and bad checkpoints.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gsa.checkpoint import legacy, manifest  # noqa: E402
from training.checkpointing.verification import verify  # noqa: E402


def newest_under(outputs: Path) -> Path | None:
    """The checkpoint that was finished last in any run folder under `outputs`, legacy ones included; None without any."""
    finished = {}
    for path in outputs.glob("*/*"):
        proof = path / manifest.MANIFEST
        if path.name.startswith("step_") and proof.exists():
            finished[path] = proof.stat().st_mtime
        elif legacy.is_legacy(path):
            finished[path] = path.stat().st_mtime
    return max(finished, key=finished.get, default=None)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--config", type=Path)
    args = parser.parse_args(argv)
    checkpoint = args.checkpoint or newest_under(Path("outputs"))
    if checkpoint is None:
        print("✗ no checkpoint under outputs/: give one, e.g. python3 tests/test_resume.py outputs/mine/step_300")
        return 1
    print(checkpoint)
    return 0 if verify(checkpoint, config=args.config) else 1


def script(*argv: str) -> subprocess.CompletedProcess:
    from support.launching import clean_environment  # only pytest finds it: the script runs without

    command = [sys.executable, str(Path(__file__)), *argv]
    return subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)


def test_the_script_passes_a_good_checkpoint_and_finds_the_newest(a_run, tmp_path, monkeypatch, capsys):
    done = script(str(a_run / "step_3"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "✓ Checkpoint loaded successfully" in lines and "✓ Model state loaded successfully" in lines
    assert lines[-1] == "✓ All checkpoint resume tests passed!"
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run").symlink_to(a_run)
    torn = tmp_path / "outputs" / "later" / "step_9"  # newer, but no checkpoint
    torn.mkdir(parents=True)
    (torn / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0 and capsys.readouterr().out.splitlines()[0].endswith("step_6")


def test_the_script_reports_what_is_wrong(tmp_path, monkeypatch, capsys):
    done = script(str(tmp_path / "step_3"))
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("✗") and "Traceback" not in done.stderr
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1 and "no checkpoint under outputs/" in capsys.readouterr().out


def test_the_newest_may_be_legacy_and_an_interrupted_save_does_not_count(tmp_path):
    assert newest_under(tmp_path) is None
    ours, theirs = tmp_path / "a" / "step_3", tmp_path / "b" / "final"
    for number, (folder, name) in enumerate([(ours, "manifest.json"), (theirs, "checkpoint_5.pt")]):
        folder.mkdir(parents=True)
        (folder / name).touch()
        os.utime(folder, (number, number)), os.utime(folder / name, (number, number))
    (tmp_path / "a" / "step_4").mkdir()
    assert newest_under(tmp_path) == theirs
    os.utime(ours / "manifest.json", (9, 9))
    assert newest_under(tmp_path) == ours


def test_the_script_takes_the_yaml_of_a_legacy_checkpoint(tmp_path):
    (tmp_path / "step_5").mkdir()
    (tmp_path / "step_5" / "checkpoint_5.pt").write_bytes(b"?")
    assert (
        main([str(tmp_path / "step_5"), "--config", "run.yaml"]) == 1
    )  # the flag is accepted; the checkpoint is refused as damaged


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
