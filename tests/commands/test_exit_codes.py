"""How a command ends: the exit code and the message of each kind of failure."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import Run, tree

import compress.checkpoint
from compress import cli, errors


def test_exit_codes_are_those_of_the_help(run: Run) -> None:
    text = " ".join(run("--help").out.split())
    documented = dict(re.findall(r"(\d+) ([a-z ]+)", text[text.index("Exit codes:") :]))
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CompressError)]
    assert {kind.exit_code for kind in classes} | {0, 130} == set(map(int, documented))
    assert documented["7"] == "verification failed"


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == compress.__version__


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["squash"],
        ["quantize"],
        ["quantize", "MODEL"],
        ["quantize", "MODEL", "-o", "OUT", "--bits", "four"],
        ["quantize", "MODEL", "-o", "OUT", "--no-such"],
        ["quantize", "MODEL", "-o", "OUT", "--method", "nothing"],
        ["quantize", "MODEL", "-o", "OUT", "--recipe", "nothing"],
        ["quantize", "MODEL", "-o", "OUT", "--set", "steps"],
        ["quantize", "MODEL", "-o", "OUT", "--set", "stesp.0=1"],
        ["quantize", "MODEL", "-o", "OUT", "--samples", "0"],
        ["quantize", "MODEL", "-o", "OUT", "--memory", "much"],
        ["run", "nothing", "MODEL", "-o", "OUT"],
        ["run", "BROKEN", "MODEL", "-o", "OUT"],
        ["run", "BROKEN", "MODEL", "-o", "OUT", "--samples", "3"],
        ["eval", "MODEL"],
        ["eval", "MODEL", "--data", "IDS", "--samples", "-1"],
    ],
)
def test_a_wrong_command_line_or_recipe_is_2(arguments: list[str], run: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("data: c4\nsteps: [{match: '*', method: quant/rtn, bits: 3}]\n")
    names = {"MODEL": model, "OUT": tmp_path / "out", "IDS": ids, "BROKEN": tmp_path / "broken.yaml"}
    done = run(*(names.get(argument, argument) for argument in arguments))
    assert done.code == 2
    assert done.err
    assert not (tmp_path / "out").exists()


def broken_models(folder: Path, model: Path) -> dict[str, Path]:
    made = {name: shutil.copytree(model, folder / name) for name in ("no config", "bad config", "pickle", "cut", "family", "nan")}
    (made["no config"] / "config.json").unlink()
    (made["bad config"] / "config.json").write_text("{")
    (made["pickle"] / "model.safetensors").rename(made["pickle"] / "pytorch_model.bin")
    cut = made["cut"] / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    config = json.loads((made["family"] / "config.json").read_text())
    (made["family"] / "config.json").write_text(json.dumps({**config, "model_type": "squirrel"}))
    path = made["nan"] / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)
    return {**made, "nowhere": folder / "nowhere", "hub": Path("no-such/model-anywhere")}


def test_a_checkpoint_that_cannot_be_read_is_3(run: Run, model: Path, packed: Path, ids: Path, tmp_path: Path) -> None:
    for name, folder in {**broken_models(tmp_path, model), "compressed": packed}.items():
        done = run("quantize", folder, "-o", tmp_path / "out", "--data", ids, "--group-size", 16, "--device", "cpu")
        assert (done.code, done.err.splitlines()[-1].startswith("error: ")) == (3, True), (name, done)
        assert not (tmp_path / "out").exists()
        if name not in ("nan", "compressed", "family"):  # what can be said of a family that nobody knows is said
            assert run("inspect", folder).code == 3, name


def test_calibration_data_that_does_not_do_is_4(quantize: Run, tmp_path: Path) -> None:
    cases = {
        "nowhere.npy": None,
        "large.npy": np.full((4, 8), 96),
        "flat.npy": np.zeros(8, dtype=np.int64),
        "floats.npy": np.zeros((4, 8)),
        "words.txt": "no tokenizer here",
    }
    for name, values in cases.items():
        if isinstance(values, str):
            (tmp_path / name).write_text(values)
        elif values is not None:
            np.save(tmp_path / name, values)
        done = quantize(data=tmp_path / name)
        assert (done.code, done.err.startswith("error: ")) == (4, True), name
    assert quantize("--samples", 99).code == 4
    assert not (tmp_path / "out").exists()


def test_another_job_in_the_folder_is_5(quantize: Run, tmp_path: Path) -> None:
    assert quantize("--keep-job", "--bits", 3).code == 0
    done = quantize("--bits", 2)
    assert done.code == 5
    assert "recipe.steps.0.options.bits was 3 and is 2 now" in done.err
    shutil.rmtree(tmp_path / "out")
    done = quantize("--bits", 2)
    assert (done.code, "recipe.steps.0.options.bits was 3 and is 2 now" in done.err) == (5, True)
    assert quantize("--bits", 3).code == 0


def test_a_place_that_cannot_be_written_is_6(quantize: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = quantize()
    assert (done.code, "is not a checkpoint that compress wrote" in done.err) == (6, True)
    assert tree(tmp_path) == {"out/thesis.tex": 4}
    (tmp_path / "file").write_text("")
    assert quantize(out="file/out").code == 6
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "notes").write_text("mine")
    done = quantize("--job", tmp_path / "job", out="other")
    assert (done.code, "is not a job folder" in done.err) == (6, True)


def test_a_bug_keeps_its_traceback(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("compress.inspection.contents.contents", broken)
    with pytest.raises(ZeroDivisionError):
        run("inspect", model)


def test_sigterm_ends_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def work(**_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", work)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"
    assert signal.getsignal(signal.SIGTERM) is before
