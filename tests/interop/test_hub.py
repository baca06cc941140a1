"""Publishing, against a stand-in for the Hub on this machine; and that nothing of this machine is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hub import Hub, hub
from runs import compress, steps

from compress.errors import OutputError, VerificationError
from compress.interop.hub import push

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several shards, made from a folder and a file whose paths are nobody's business."""
    root = tmp_path_factory.mktemp("jane") / "secret"
    model = Path(shutil.copytree(tiny("llama"), root / "model"))
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlanguage: [en]\n---\nHello\n")
    data = Path(shutil.copy(ids, root / "words.npy"))
    out = root / "out"
    compress(model, out, data, steps(bits=4, group_size=16), max_shard_size="20KB", reload=True, description=f"for {root}/x")
    return out


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as found:
        yield found


def texts(folder: Path) -> dict[str, str]:
    return {
        path.name: path.read_text(errors="replace")
        for path in folder.iterdir()
        if path.suffix in (".json", ".jsonl", ".yaml", ".md", ".html")
    }


def test_no_path_of_this_machine_is_in_a_file(checkpoint: Path) -> None:
    found = texts(checkpoint)
    assert str(checkpoint.parent) in found.pop(".local.json"), "which stays here"
    assert len(found) > 5
    for name, text in found.items():
        assert str(checkpoint.parent) not in text, name
        assert "jane" not in text, name
    summary = json.loads(found["summary.json"])
    assert summary["base_model"] == "model"
    assert summary["identity"]["recipe"]["data"]["name"] == "words.npy"
    assert yaml.safe_load(found["recipe.yaml"])["data"]["name"] == "words.npy"


def test_the_same_job_is_still_known(checkpoint: Path) -> None:
    root = checkpoint.parent
    again = compress(
        root / "model",
        checkpoint,
        root / "words.npy",
        steps(bits=4, group_size=16),
        max_shard_size="20KB",
        description=f"for {root}/x",
    )
    assert again.resumed


def test_the_card_names_what_others_need(checkpoint: Path) -> None:
    front = yaml.safe_load((checkpoint / "README.md").read_text().split("---")[1])
    assert (front["license"], front["license_name"], front["language"]) == ("other", "tiny", ["en"])
    text = (checkpoint / "README.md").read_text()
    assert "Loading was tested in a fresh process with transformers 5" in text
    assert "cores of" in text


def test_the_original_is_still_found_on_this_machine(checkpoint: Path, tmp_path: Path) -> None:
    from compress.evaluation.quality import base_of

    assert base_of(str(checkpoint)) == str((checkpoint.parent / "model").resolve())
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    (moved / ".local.json").unlink()
    assert base_of(str(moved)) is None


def test_a_push_arrives_whole(checkpoint: Path, there: Hub, tmp_path: Path) -> None:
    done = there.run(tmp_path, "push", checkpoint, "me/tiny-4bit", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert there.private == {"me/tiny-4bit": True}
    arrived = there.files["me/tiny-4bit"]
    arrived.pop(".gitattributes", None)
    expected = {path.name: path.read_bytes() for path in checkpoint.iterdir() if not path.name.startswith(".")}
    assert arrived == expected
    assert ".local.json" not in arrived
    assert json.loads(done.stdout)["files"] == {name: len(content) for name, content in sorted(expected.items())}


def test_public_is_the_default_and_a_dry_run_sends_nothing(checkpoint: Path, there: Hub, tmp_path: Path) -> None:
    done = there.run(tmp_path, "push", checkpoint, "me/tiny-4bit", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert there.asked == []
    assert "model.safetensors.index.json" in done.stdout and "nothing was sent" in done.stdout
    assert "(public)" in done.stdout


def test_a_push_that_fails_goes_on(checkpoint: Path, there: Hub, tmp_path: Path) -> None:
    """What has arrived before the failure is not sent again."""
    shards = list(checkpoint.glob("*.safetensors"))
    assert len(shards) > 2
    kept = shards[0].read_bytes()
    import hashlib

    there.stored[hashlib.sha256(kept).hexdigest()] = kept
    there.fail_uploads = 1000
    failed = there.run(tmp_path, "push", checkpoint, "me/tiny-4bit")
    assert failed.returncode == 6
    assert "run the same command again" in failed.stderr
    there.fail_uploads = 0
    done = there.run(tmp_path, "push", checkpoint, "me/tiny-4bit")
    assert done.returncode == 0, done.stderr
    uploads = [path for method, path, _ in there.asked if method == "PUT"]
    assert not [path for path in uploads if path.endswith(hashlib.sha256(kept).hexdigest())]
    assert there.files["me/tiny-4bit"][shards[1].name] == shards[1].read_bytes()


def test_what_must_not_be_published(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="user/name"):
        push(checkpoint, "no-user", False, True)
    with pytest.raises(OutputError, match="not a checkpoint"):
        push(tmp_path, "me/x", False, True)
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    (changed / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"config\.json: was changed"):
        push(changed, "me/x", False, True)
    leaking = Path(shutil.copytree(checkpoint, tmp_path / "leaking"))
    (leaking / "notes.md").write_text(f"made in {leaking.parent}")
    with pytest.raises(OutputError, match=r"notes\.md: holds"):
        push(leaking, "me/x", False, True)
