"""Where tasks come from: reasoning-gym's families, the small embedded families, the user's files, the hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from actors.errors import DataError
from training.outcomes import Task, read_tasks
from training.splits import check_tasks, plain, split_of
from training.task_files import Columns, hub_tasks, jsonl_tasks, parquet_tasks

__all__ = [
    "EASY_ONLY",
    "EXCLUDED",
    "Columns",
    "TaskSource",
    "check_tasks",
    "hub_tasks",
    "jsonl_tasks",
    "load_tasks",
    "parquet_tasks",
    "reasoning_gym_tasks",
    "usable_families",
]

Difficulty = Literal["easy", "hard"]

_NO_REFERENCE = "has no answer of its own, so nothing shows that its verifier works"
_GRIDS = "scores its own answer 0.05 once the task was stored: its verifier wants tuples where files have lists"
_HASHES = "makes other tasks in each process from the same seed: it walks through sets"
_SLOW = "takes seconds to minutes to make one task"

# Families that cannot be used as they come, each with its reason. Found by making tasks of every family of 0.1.25 and
# grading its own answers; the test of usable families does the same.
EXCLUDED: Mapping[str, str] = {
    "arc_agi": _GRIDS,
    "boxnet": _NO_REFERENCE,
    "composite": "has no tasks of its own: it mixes other families by a configuration",
    "game_of_life_halting": "gives any text full marks where the answer is False",
    "graph_color": _NO_REFERENCE,
    "isomorphic_strings": _HASHES,
    "knight_swap": "takes half a second to make one task, and up to minutes",
    "polynomial_multiplication": _HASHES,
    "propositional_logic": _NO_REFERENCE,
    "ransom_note": _HASHES,
    "rearc": _GRIDS,
    "rubiks_cube": _NO_REFERENCE,
    "rush_hour": _NO_REFERENCE,
    "word_ladder": _HASHES,
}
# Those that can be used at their own difficulty only.
EASY_ONLY: Mapping[str, str] = {
    "bf": _SLOW,
    "codeio": "makes other tasks each time from the same seed",
    "countdown": _SLOW,
    "jugs": _SLOW,
}

# The package makes item i of a data set from seed + i: without a stride, neighbouring seeds would share their items.
SEED_STRIDE = 1_000_000

# The level (from 0) of the package's curricula that is hard; easy is a family's own default.
_HARD = 2


@dataclass(frozen=True)
class TaskSource:
    """How tasks are made or read where their source leaves it open: how many of each family, from which seed, how
    hard; grader and split of a file's rows, and which of its columns stand for ours (see `task_files.Columns`)."""

    count: int = 20
    seed: int = 0
    difficulty: Difficulty = "easy"
    columns: Columns = field(default_factory=Columns)


def load_tasks(sources: Sequence[str], settings: TaskSource | None = None) -> list[Task]:
    """Tasks of all sources together, checked. A source is one of

        reasoning-gym[:FAMILY,...]     all usable families, or these
        embedded[:FAMILY,...]          the families for very small models (training.families)
        grounds[:GROUND,...]           the specialists' grounds (training.grounds); `count` of each ground
        composite[:FAMILY,...]         tasks for several specialists together (training.composite); `count` in all
        PATH.jsonl | PATH.parquet      a file of the user's own
        FOLDER                         the tasks of an outcomes folder
        hub:NAME[:SUBSET][@PART]       a Hugging Face data set, or a folder with its files

    Raises:
        DataError: names the source, file, row or task.
    """
    settings = settings or TaskSource()
    tasks: list[Task] = []
    for source in sources:
        tasks += _load(source, settings)
    check_tasks(tasks)
    return tasks


def _load(source: str, settings: TaskSource) -> list[Task]:
    kind, _, detail = source.partition(":")
    families = [name.strip() for name in detail.split(",") if name.strip()]
    if kind == "reasoning-gym":
        return reasoning_gym_tasks(
            families or usable_families(settings.difficulty),
            count=settings.count,
            seed=settings.seed,
            difficulty=settings.difficulty,
            split=settings.columns.split,
        )
    if kind == "embedded":
        from training.families import FAMILIES, family_tasks

        made = family_tasks(families or list(FAMILIES), count=settings.count, seed=settings.seed)
        # Split by hash like all others, so that runs with other seeds do not mix train and test.
        return [replace(task, split=settings.columns.split or split_of(task.prompt)) for task in made]
    if kind == "grounds":
        from training.ground_families import GROUNDS
        from training.grounds import ground_tasks

        made = ground_tasks(families or list(GROUNDS), count=settings.count, seed=settings.seed, split=None)
        return [replace(task, split=settings.columns.split or task.split) for task in made]
    if kind == "composite":
        from training.composite import composite_tasks

        return composite_tasks(families, count=settings.count, seed=settings.seed, split=settings.columns.split)
    if kind == "hub":
        name, _, part = detail.partition("@")
        name, _, subset = name.partition(":")
        if not name:
            raise DataError(f"{source}: name a data set, for example hub:NAME@train")
        return hub_tasks(name, part=part or "train", subset=subset or None, columns=settings.columns)
    path = Path(source)
    if path.suffix == ".jsonl":
        return jsonl_tasks(path, columns=settings.columns)
    if path.suffix == ".parquet":
        return parquet_tasks(path, columns=settings.columns)
    if path.is_dir():
        return list(read_tasks(path))
    raise DataError(
        f"{source} is no source of tasks: give reasoning-gym[:family,...], embedded[:family,...], "
        "grounds[:ground,...], composite[:family,...], hub:name, a .jsonl or .parquet file, or an outcomes folder"
    )


def usable_families(difficulty: Difficulty = "easy") -> list[str]:
    """The reasoning-gym families that are not excluded and have this difficulty, by name.

    Raises:
        DataError: the package is not installed.
    """
    factory = _package().factory
    return [
        name
        for name in sorted(factory.DATASETS)
        if name not in EXCLUDED and (difficulty == "easy" or (name not in EASY_ONLY and factory.has_curriculum(name)))
    ]


def reasoning_gym_tasks(
    families: Sequence[str],
    *,
    count: int,
    seed: int,
    split: str | None = None,
    difficulty: Difficulty = "easy",
    config: Mapping[str, Any] | None = None,
) -> list[Task]:
    """`count` (below a million) tasks of each family, fewer where a family has not as many different ones. Equal
    arguments give equal tasks, other seeds other ones. `split` None splits by the hash of the prompt. `config` goes to
    each family's generator, over what its difficulty sets.

    Raises:
        DataError: an unknown or excluded family, one without this difficulty, or one that cannot be made with this
            configuration; or the package is not installed.
    """
    package = _package()
    tasks = []
    for family in families:
        if family in EXCLUDED:
            raise DataError(f"the reasoning-gym family {family} is not used: it {EXCLUDED[family]}")
        if family not in package.factory.DATASETS:
            raise DataError(f"reasoning-gym has no family {family}")
        settings = {**_difficulty(family, difficulty), **(config or {})}
        try:
            dataset = package.create_dataset(family, size=count, seed=seed * SEED_STRIDE, **settings)
            entries = [dataset[index] for index in range(count)]
        except (TypeError, ValueError, AssertionError) as error:
            raise DataError(f"reasoning-gym cannot make {family}: {error}") from error
        seen: set[str] = set()
        for index, entry in enumerate(entries):
            if plain(entry["question"]) in seen:
                continue
            seen.add(plain(entry["question"]))
            tasks.append(
                Task(
                    task_id=f"rg-{difficulty}-{family}-{seed}-{index:04d}",
                    prompt=entry["question"],
                    reference="" if entry["answer"] is None else str(entry["answer"]),
                    domain=type(dataset).__module__.split(".")[1],
                    dataset=family,
                    split=split or split_of(entry["question"]),
                    grader=f"reasoning_gym:{family}",
                    extra={"entry": json.dumps(entry, default=str), "difficulty": difficulty},
                )
            )
    return tasks


def _difficulty(family: str, difficulty: Difficulty) -> dict[str, Any]:
    if difficulty == "easy":
        return {}
    if difficulty != "hard":
        raise DataError(f"difficulty {difficulty} is neither easy nor hard")
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if family in EASY_ONLY:
        raise DataError(f"the reasoning-gym family {family} is easy only: harder, it {EASY_ONLY[family]}")
    if not has_curriculum(family):
        raise DataError(f"the reasoning-gym family {family} has no difficulty but easy")
    curriculum = create_curriculum(family)
    curriculum.set_global_level(_HARD)
    # This level and the one below, not everything down to the easiest.
    context = DefaultCurriculumContext(mode=RangeAttributeMode.LAST_K, k=2)
    settings = dataclasses.asdict(curriculum.generate_configuration(context=context))
    return {key: value for key, value in settings.items() if key not in ("seed", "size")}


def _package() -> Any:
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise DataError("reasoning-gym is not installed; install the extra `train`") from error
    return reasoning_gym
