"""`compress push`: a checkpoint to the Hugging Face Hub, after a look at what would be published.

Large files that the Hub has already are not sent again, so that a push that was interrupted goes on when it is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.recorded_files import recorded_files, sha256_of
from compress.errors import CheckpointError, OutputError, VerificationError
from compress.report.redaction import LOCAL, is_hub_id
from compress.system.side_files import lies_within, read_object, read_side_file

_TEXTS = (".json", ".jsonl", ".yaml", ".md", ".html", ".txt", ".jinja")
_LONG = 64 << 20  # bytes of a text that is looked through


@dataclass(frozen=True)
class Push:
    """What is, or would be, published."""

    repository: str
    private: bool
    files: dict[str, int]  # bytes by name
    url: str | None = None  # None after a dry run

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def plain(self) -> dict[str, Any]:
        """The push as JSON values."""
        return {
            "repository": self.repository,
            "private": self.private,
            "files": self.files,
            "bytes": self.size,
            "url": self.url,
        }


def _files(folder: Path) -> dict[str, int]:
    """Everything but what is hidden. Raises OutputError where a link leads out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if outside := [path for path in paths if not lies_within(path, folder)]:
        raise OutputError(f"{outside[0]}: is a link to a place outside of the checkpoint; nothing was published. Remove it")
    named = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in named.items() if not any(part.startswith(".") for part in name.split("/"))}


def _check(folder: Path, files: dict[str, int]) -> None:
    """Raise where a file is not what was written, or tells paths of this machine."""
    try:
        record = folder / "summary.json" if (folder / "summary.json").is_file() else folder / "export.json"
        recorded = recorded_files(read_object(record)["files"])
    except (CheckpointError, ValueError, KeyError) as error:
        raise OutputError(f"{folder}: not a checkpoint that compress wrote ({error}); push knows no other") from error
    for name, digest in recorded.items():
        if name not in files or sha256_of(folder, name) != digest:
            what = "was changed since it was written" if name in files else "is missing"
            raise VerificationError(f"{folder / name}: {what}; compress verify says more. Nothing was published")
    secrets = {str(folder.resolve().parent), str(Path.home())}
    if (folder / LOCAL).is_file():
        secrets |= {text for text in read_object(folder / LOCAL).values() if isinstance(text, str)}
    secrets = {text for text in secrets if text.count("/") > 1}
    for name, size in files.items():
        if not name.endswith(_TEXTS) or size > _LONG or name.startswith("tokenizer"):
            continue
        text = read_side_file(folder / name, _LONG).decode("utf-8", errors="replace")
        if found := sorted(secret for secret in secrets if secret in text):
            raise OutputError(
                f"{folder / name}: holds {found[0]!r}, a path of this machine; nothing was published. Compress the model again "
                "with this version, or take the path out and run compress verify"
            )


def push(folder: Path, repository: str, private: bool, dry_run: bool, message: str | None = None) -> Push:
    """Publish a checkpoint under user/name and return what went there. Raises OutputError, VerificationError."""
    if repository.count("/") != 1 or not is_hub_id(repository):
        raise OutputError(f"{repository}: not a name for a repository; expected user/name")
    files = _files(folder) if folder.is_dir() else {}
    _check(folder, files)
    if dry_run:
        return Push(repository, private, files)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(library_name="compress")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(files),
            ignore_patterns=[LOCAL, ".*"],
            commit_message=message or "Compressed by compress",
        )
    except (OSError, HFValidationError, RuntimeError) as error:  # every failure of the Hub's client
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise OutputError(
            f"{repository}: {(lines or [type(error).__name__])[0]}; run the same command again to go on, what has arrived is not "
            "sent again. Where it asks who you are: hf auth login"
        ) from error
    return Push(repository, private, files, str(getattr(done, "commit_url", done)))
