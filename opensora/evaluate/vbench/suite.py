"""The suites `vbench` and `vbench-i2v`: draw or take videos, judge them, write what was found.

A dimension whose weights or package are absent is skipped with the reason; a total appears only
when all of its dimensions do. Where an installed upstream package can do what the weights here
cannot, it is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from opensora.disk import preflight, reclaim
from opensora.errors import DataError, UsageError
from opensora.evaluate.suite import (
    Progress,
    Results,
    Subject,
    Suite,
    check_finite,
    write_scores,
    write_values,
)
from opensora.evaluate.vbench import generate, judge, prompts, results, static, videos, warn
from opensora.evaluate.vbench.config import (
    DRAWING,
    DrawingConfig,
    I2VConfig,
    UpstreamConfig,
    VBenchConfig,
)
from opensora.evaluate.vbench.dimensions import DIMENSIONS, names
from opensora.evaluate.vbench.ledger import Ledger
from opensora.evaluate.vbench.prompts import Entry, Version
from opensora.evaluate.vbench.tools import Tools
from opensora.evaluate.vbench.upstream import Delegated, Upstream
from opensora.evaluate.vbench.videos import Collection, Video
from opensora.evaluate.vbench.weights import Shelf
from opensora.infer.jobs import Job

log = logging.getLogger("opensora")


@dataclass
class Run:
    """One run of a suite, from its settings to its findings.

    Attributes:
        tools: networks of the dimensions that are measured here; `ledger` what was measured.
        known: all entries of the prompt file; `entries` those that the dimensions need.
        skipped: dimension -> why it has no score.
        unfiltered: temporal_flickering had no static filter.
    """

    config: DrawingConfig
    version: Version
    subject: Subject
    output: Path
    progress: Progress
    known: tuple[Entry, ...] = ()
    entries: list[Entry] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unfiltered: bool = False

    def __post_init__(self) -> None:
        folder = self.config.weights_dir
        shelf = Shelf(Path(folder).expanduser() if folder else None, self.config.download)
        self.tools = Tools(shelf, self.subject.place.device)
        self.upstream = Upstream(self.config.upstream, self.version)
        preflight(self.output)
        if self.subject.place.is_main:
            reclaim(self.output)
        self.ledger = Ledger(self.output, shelf)

    @property
    def pictures(self) -> Path | None:
        """The folder of I2V's pictures, where it is named."""
        return self.config.pictures_dir if isinstance(self.config, I2VConfig) else None

    def lacking(self, dimension: str) -> str | None:
        """Why a dimension cannot be measured here; None where it can."""
        return DIMENSIONS[self.version][dimension].lacking(self.tools.shelf, self.pictures)

    def stage(self, name: str) -> Any:
        """The progress of one stage, as a callable of (done, total)."""
        return partial(self.progress, name)


def _run_v1(subject: Subject, config: VBenchConfig, output: Path, progress: Progress) -> Results:
    return run(subject, config, output, progress, version="v1")


def _run_i2v(subject: Subject, config: I2VConfig, output: Path, progress: Progress) -> Results:
    if subject.videos is None and config.pictures is None:
        raise UsageError("videos begin with VBench-I2V's pictures: give their folder as pictures")
    return run(subject, config, output, progress, version="i2v")


def run(
    subject: Subject,
    config: DrawingConfig,
    output: str | Path,
    progress: Progress,
    *,
    version: Version,
) -> Results:
    """Draw what is missing, judge, and write the result files; a stopped call is completed by the
    same call.

    Args:
        output: gets `samples/` (of a model), `<name>_eval_results.json`, `<name>_full_info.json`
            and `scores.json`.

    Returns:
        What `scores.json` holds: the groups 'vbench', 'totals' and 'proxy', and `settings` with
        the reasons of skipped dimensions and with warnings. The same on every rank, but for
        upstream's dimensions, which the first rank alone waits for.
    """
    one = Run(config, version, subject, Path(output), progress)
    subject.place.barrier()  # no rank writes into the ledger before all of them have read it
    asked = _dimensions(one)
    one.known = prompts.load(version, config.prompts) if config.mode == "standard" else ()
    one.entries = prompts.select(one.known, asked, config.num_prompts)
    folder, collection = _collect(one, asked)
    here, there = _routes(one, asked)
    tasks = _tasks(one, asked, collection)
    if "temporal_flickering" in asked:
        _filter(one, tasks)
    table = {name: DIMENSIONS[version][name] for name in here}
    judged = judge.Judge(table, one.tools, one.ledger, with_proxies=config.proxies).judge(
        tasks, subject.place, one.stage("judging")
    )
    for name in here:
        if not judged.rows.get(name):
            reasons = [reason for _, which, reason in judged.unusable if which in ("", name)]
            one.skipped[name] = reasons[0] if reasons else "there are no videos for it"
    findings: dict[str, results.Finding] = {n: r for n in here if (r := judged.rows.get(n))}
    if subject.place.is_main:
        findings |= _delegate(one, there, tasks)
    return _conclude(one, asked, folder, collection, tasks, judged, findings)


def _dimensions(one: Run) -> list[str]:
    """The dimensions asked for, in VBench's order."""
    config, table = one.config, DIMENSIONS[one.version]
    asked = [name for name in names(one.version) if name in (config.dimensions or table)]
    if config.mode == "standard":
        return asked
    if one.subject.videos is None:
        raise UsageError("mode=custom judges finished videos: give a folder of them")
    set_in_vain = [key for key in ("prompts", "num_prompts") if getattr(config, key) is not None]
    if set_in_vain:
        raise UsageError(f"mode=custom takes all videos of the folder; leave out {set_in_vain[0]}")
    refused = [name for name in asked if table[name].by_prompt]
    if config.dimensions and refused:
        raise UsageError(f"{refused[0]} depends on VBench's prompts: it has no mode=custom")
    return [name for name in asked if name not in refused]


def _collect(one: Run, asked: Sequence[str]) -> tuple[Path, Collection]:
    """The folder of the videos, which are drawn where a model is given, and what it holds."""
    config, subject = one.config, one.subject
    many = config.flicker_samples if isinstance(config, VBenchConfig) else 1
    counts = generate.samples_of(
        one.entries, asked, samples=config.samples_per_prompt, flicker_samples=many
    )
    if subject.videos is None:
        folder = one.output / "samples"
        work = _jobs(one, counts)
        generate.draw(
            subject.model, work, folder, config, place=subject.place, progress=one.stage("drawing")
        )
        return folder, videos.by_prompt(folder, one.entries, one.known, counts)
    in_vain = sorted(DRAWING & config.model_fields_set)
    if in_vain:
        raise UsageError(f"{in_vain[0]} means nothing for finished videos: leave it out")
    if config.mode == "custom":
        return subject.videos, videos.by_any_name(subject.videos)
    return subject.videos, videos.by_prompt(subject.videos, one.entries, one.known, counts)


def _jobs(one: Run, counts: dict[str, int]) -> list[Job]:
    """What to draw, with rewritten prompts or pictures where the config names them."""
    config = one.config
    rewritten = None
    if isinstance(config, VBenchConfig) and config.rewritten is not None:
        rewritten = prompts.read_rewritten(config.rewritten, one.known)
    return generate.jobs(one.known, counts, config.seed, rewritten=rewritten, pictures=one.pictures)


def _routes(one: Run, asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Dimensions that are measured here, and those that upstream is asked for."""
    here, there = [], []
    for name in asked:
        lacking = one.lacking(name)
        if lacking is None:
            here.append(name)
        elif one.upstream.lacking is None:
            there.append(name)
        else:
            told = one.config.upstream != UpstreamConfig()  # then what is wrong with it, too
            one.skipped[name] = f"{lacking} ({one.upstream.lacking})" if told else lacking
    return here, there


def _tasks(one: Run, asked: Sequence[str], found: Collection) -> dict[str, list[judge.Task]]:
    if one.config.mode == "custom":
        everything = [judge.Task(video) for of in found.videos.values() for video in of]
        return {name: list(everything) for name in asked}
    samples = one.config.samples_per_prompt
    tasks = judge.tasks_of(one.entries, asked, found.videos, samples)
    for name in asked:
        if DIMENSIONS[one.version][name].picture and one.pictures is not None:
            tasks[name] = _with_pictures(tasks[name], one.entries, one.pictures)
    # Of prompts for flickering all samples are candidates, until the filter has chosen.
    everything = judge.tasks_of(one.entries, ["temporal_flickering"], found.videos, 10**6)
    return tasks if "temporal_flickering" not in asked else tasks | everything


def _with_pictures(
    tasks: Sequence[judge.Task], entries: Sequence[Entry], folder: Path
) -> list[judge.Task]:
    """The same tasks with the pictures to compare with, and what tells a changed picture.

    Whether a picture is there shows when it is read: one that is not costs its videos, not the run.
    """
    paths = {entry.prompt: folder / (entry.picture or "") for entry in entries}
    about = {}
    for prompt, path in paths.items():
        facts = path.stat() if path.is_file() else None
        version = [facts.st_size, facts.st_mtime_ns] if facts is not None else None
        about[prompt] = {"picture": str(path), "version": version}
    return [judge.Task(task.video, about[task.video.prompt]) for task in tasks]


def _filter(one: Run, tasks: dict[str, list[judge.Task]]) -> None:
    """Keep the first static videos of each prompt, where that can be told; else the first ones."""
    config, name = one.config, "temporal_flickering"
    groups: dict[str, list[Video]] = {}
    for task in tasks[name]:
        groups.setdefault(task.video.prompt, []).append(task.video)
    check = _static_check(one, [task.video for task in tasks[name]])
    if check is None:
        one.unfiltered = True
        limit = config.samples_per_prompt
        kept = {p: sorted(of, key=lambda v: v.sample or 0)[:limit] for p, of in groups.items()}
        if config.mode == "custom":
            kept = groups
    else:
        kept = static.filtered(
            groups,
            check,
            one.subject.place,
            one.stage("static filter"),
            count=config.samples_per_prompt,
        )
    tasks[name] = [judge.Task(video) for of in kept.values() for video in of]


def _static_check(one: Run, candidates: Sequence[Video]) -> Any:
    """Whether a video holds still, by a list or by flow; None where it cannot be told."""
    if one.config.static_list is not None:
        return static.by_list(one.config.static_list, candidates)
    if one.config.mode == "custom":
        return None
    if one.lacking("dynamic_degree") is not None or not static.large_enough(candidates):
        return None
    return static.by_flow(one.tools, one.ledger)


def _delegate(
    one: Run, there: Sequence[str], tasks: dict[str, list[judge.Task]]
) -> dict[str, Delegated]:
    """Ask upstream for dimensions; what fails there is skipped with its last words."""
    if not there:
        return {}
    info = one.output / f"{one.config.name}_full_info.json"
    results.write_json(info, _full_info(one, tasks))
    found = {}
    for number, name in enumerate(there):
        paths = [task.video.path for task in tasks[name]]
        if not paths:
            one.skipped[name] = "there are no videos for it"
            continue
        device = str(one.subject.place.device)
        try:
            found[name] = one.upstream.run(name, info, paths, one.output / "upstream", device)
        except DataError as error:
            one.skipped[name] = str(error)
        one.progress("upstream", number + 1, len(there))
    return found


def _full_info(one: Run, tasks: dict[str, list[judge.Task]]) -> list[Any]:
    """Every entry with its videos: those that the filter kept, where it serves flickering only."""
    if one.config.mode == "custom":
        files = dict.fromkeys(task.video for of in tasks.values() for task in of)
        return [
            {"prompt_en": v.prompt, "dimension": list(tasks), "video_list": [str(v.path)]}
            for v in files
        ]
    listed: dict[int, list[Video]] = {}
    for entry in one.entries:
        mine = next((d for d in entry.dimensions if d != "temporal_flickering" and d in tasks), "")
        of = tasks.get(mine or "temporal_flickering", [])
        listed[entry.index] = [task.video for task in of if task.video.prompt == entry.prompt]
    return results.full_info(one.entries, listed)


def _conclude(
    one: Run,
    asked: Sequence[str],
    folder: Path,
    collection: Collection,
    tasks: dict[str, list[judge.Task]],
    judged: judge.Judgement,
    findings: dict[str, results.Finding],
) -> Results:
    """Put everything together; the first rank writes it.

    Raises:
        NumericsError: a measure is no finite number; nothing was written.
    """
    ordered = {name: findings[name] for name in asked if name in findings}
    proxies = {
        name: rows for name in (judge.MOTION, judge.SMOOTHNESS) if (rows := judged.rows.get(name))
    }
    samples = results.samples(ordered, proxies)
    check_finite(samples)
    scores: Results = dict(results.groups(ordered, proxies, one.version))
    warnings = warn.warnings(
        one.config, collection, judged, scores, tasks, unfiltered=one.unfiltered
    )
    pipeline = one.subject.pipeline
    scores["settings"] = {
        "suite": "vbench" if one.version == "v1" else "vbench-i2v",
        "weights": pipeline.fingerprint if pipeline is not None else None,
        "videos": str(folder),
        "warnings": warnings,
        "skipped": one.skipped,
        "missing": {"count": len(collection.missing), "first": collection.missing[:10]},
        "unusable": [" ".join(part for part in row if part) for row in judged.unusable[:10]],
        **one.config.model_dump(mode="json"),
    }
    if one.subject.place.is_main:
        base = one.output / one.config.name
        results.write_json(Path(f"{base}_full_info.json"), _full_info(one, tasks))
        results.write_json(Path(f"{base}_eval_results.json"), results.upstream_shape(ordered))
        write_values(one.output, samples)
        write_scores(one.output, scores)
        _tell(one, asked, scores)
    return scores


def _tell(one: Run, asked: Sequence[str], scores: Results) -> None:
    """What a reader of the table must know, into the log; the warnings last."""
    reasons: dict[str, list[str]] = {}
    for name, reason in one.skipped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, which in reasons.items():
        log.info("skipped: %s: %s", ", ".join(which), reason)
    if "total" not in scores.get("totals", {}) and set(asked) == set(names(one.version)):
        measured = len(scores.get("vbench", {}))
        log.info("no Total: it takes all of its dimensions, of which %d were measured", measured)
    for text in scores["settings"]["warnings"]:
        log.warning("%s", text)


SUITE = Suite(VBenchConfig, _run_v1)
I2V_SUITE = Suite(I2VConfig, _run_i2v)
