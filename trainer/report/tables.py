"""Tables of a report on one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainer.report.html import Html, folded, join, paragraph, table
from trainer.report.measures import ALAIN, FORGETTING, LOPEZ_PAZ, MEASURES, MEMORISATION, WU, Measure, digits, number
from trainer.report.source import Source
from trainer.tracking.progress import duration
from trainer.tracking.table import best_level, percent_text

Result = Mapping[str, Any]
FLOOR = (
    "Floor: what as many real images get in place of the samples (docs/run-directory.md says which). A measure of "
    "fewer images has a worse one: compare equal counts."
)
FORGOTTEN = {
    "forgetting": "FD",
    "forgetting_accuracy": "accuracy",
    "forgetting_classifier_accuracy": "classifier",
    "forgetting_model_accuracy": "model accuracy",
    "forgetting_loss": "loss",
}
OF_TEST_IMAGES = {  # measures of these, and where their number stands
    "loss": "loss_images",
    "bpd": "bpd_images",
    "classifier_accuracy": "classifier_images",
    "model_accuracy": "model_images",
}
COSTS = (  # key, what it is, how it is written
    ("wall_seconds", "wall time, all attempts", "duration"),
    ("train_seconds", "training", "duration"),
    ("images_per_second", "real images per second", "number"),
    ("teacher_evaluations", "teacher evaluations", "count"),
    ("replay_points_used", "replay points used", "count"),
    ("starved_seconds", "waited for replay", "seconds"),
    ("data_wait_seconds", "waited for images, main rank", "seconds"),
    ("peak_memory_gb", "peak memory, main rank", "GB"),
    ("model_tflops", "TFLOP/s of one device", "number"),
    ("mfu", "of the device's peak (MFU)", "percent"),
    ("skipped_steps", "steps skipped", "count"),
)


def final_table(result: Result) -> Html:
    """Each measure over all classes at the end, beside its floor, its counts and its source."""
    final = result["final"]
    floor = final.get("floor") or {}
    rows = [
        [
            measure.title,
            digits(value, measure) + _error(final, measure),
            digits(number(floor.get(measure.key)), measure),
            "↑" if measure.higher_is_better else "↓",
            _images(final, measure),
            measure.meaning,
            measure.source,
        ]
        for measure in MEASURES
        if (value := number(final.get(measure.key))) is not None
    ]
    rows += _own_classifier_rows(final, len(result["after_task"])) + _probe_rows(final) + _forgetting_rows(final)
    header = ["measure", "value", "floor", "better", "images", "meaning", "source"]
    shown = table(header, rows, words=(5,), short=(3, 4, 6))
    notes = [paragraph(FLOOR)] if floor else []
    lost = ", ".join(map(str, final.get("lost_tasks") or []))
    if lost:
        notes.insert(0, paragraph(f"Nothing is generated any more of task {lost}.", "warning"))
    return join([shown, *notes])


def _error(final: Result, measure: Measure) -> str:
    error = number(final.get("bpd_standard_error")) if measure.key == "bpd" else None
    return "" if error is None else f" ± {error:.2g}"


def _images(final: Result, measure: Measure) -> str:
    """How many images a measure comes from."""
    if measure.key in OF_TEST_IMAGES:
        return _test_images(final.get(OF_TEST_IMAGES[measure.key]))
    samples, real = final.get("samples"), final.get("real_images")
    if not isinstance(samples, int):
        return ""
    alone = measure.key == "accuracy" or not isinstance(real, int)
    return f"{samples:,}" if alone else f"{samples:,} against {real:,}"


def _test_images(count: object) -> str:
    return f"{count:,} test images" if isinstance(count, int) else ""


def _own_classifier_rows(final: Result, tasks: int) -> list[list[str]]:
    """The accuracy of the model's own classifier by task, in single numbers."""
    told = {
        "average_accuracy": ("average accuracy", f"model accuracy, as a mean over {tasks} tasks"),
        "backward_transfer": (
            "backward transfer",
            "of it, from right after each task to the end; below 0: forgotten",
        ),
    }
    images = _test_images(final.get("model_images"))
    return [
        [title, f"{value:.3f}", "", "↑", images, meaning, LOPEZ_PAZ]
        for key, (title, meaning) in told.items()
        if (value := number(final.get(key))) is not None
    ]


def _probe_rows(final: Result) -> list[list[str]]:
    """Each probe at the level of noise where it is right most often."""
    probe = final.get("probe") or {}
    found = (("linear", "linear probe", ALAIN), ("knn", "k-NN probe", WU))
    return [
        [
            *(title, f"{best.accuracy:.3f}", "", "↑", _test_images(probe.get("test_images"))),
            f"on the model's features, learnt from {probe.get('images', 0):,} training images; the best of "
            f"{len(probe['timesteps'])} levels of noise, t = {best.timestep}",
            source,
        ]
        for kind, title, source in found
        if (best := best_level(final, kind)) is not None
    ]


def _forgetting_rows(final: Result) -> list[list[str]]:
    rows = []
    for key, title in FORGOTTEN.items():
        value = number(final.get(key))
        if value is not None:
            loss = key == "forgetting_loss"
            since = "since each task was learnt" if loss else "from each task's best to the end"
            shown = f"{value:.3f}" if key.endswith("accuracy") else digits(value)
            rows.append([f"forgetting, {title}", shown, "", "↓", "", since, "" if loss else FORGETTING])
    return rows


def task_table(result: Result) -> Html:
    """All measures over all classes seen, after each task."""
    rows = result["after_task"]
    present = [measure for measure in MEASURES if any(number(row.get(measure.key)) is not None for row in rows)]
    header = ["after task", *(measure.title for measure in present)]
    lines = [
        [str(task), *(digits(number(row.get(measure.key)), measure) for measure in present)]
        for task, row in enumerate(rows, 1)
    ]
    return folded("as numbers", table(header, lines))


def memorisation_table(result: Result) -> Html:
    """How near samples come to learnt images at the end, beside what test images get; empty where not measured."""
    nearest = result["final"].get("nearest") or {}
    rows = [
        [
            f"{_learnt(name)}, by {space}",
            percent_text(found[space].get("memorised")),
            percent_text(found[space].get("held_out_memorised")),
            digits(number(found[space].get("distance"))),
            digits(number(found[space].get("held_out_distance"))),
            f"{found.get('samples', 0):,} against {found.get('learnt_images', 0):,}",
        ]
        for name, found in nearest.items()
        for space in ("features", "pixels")
        if space in found
    ]
    if not rows:
        return Html("")
    header = ["nearest to", "memorised", "floor", "median distance", "of test images", "samples, images"]
    told = (
        f"Memorised: nearer to the nearest learnt image than any other training image is to that one ({MEMORISATION}). "
        "Floor: the same of test images, which nobody has copied."
    )
    return join([paragraph(told), table(header, rows)])


def _learnt(name: str) -> str:
    return {"buffer": "the rehearsed buffer", "training": "all training images"}.get(name, name)


def cost_table(result: Result) -> Html:
    cost = result.get("cost") or {}
    rows = [
        [title, cost_text(value, kind)] for key, title, kind in COSTS if (value := number(cost.get(key))) is not None
    ]
    return table(["cost", ""], rows) if rows else Html("")


def cost_text(value: float, kind: str) -> str:
    """A cost as COSTS says that it is written."""
    if kind == "duration":
        return duration(value)
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "percent":
        return percent_text(value)
    unit = {"seconds": " s", "GB": " GB"}.get(kind, "")
    return digits(value) + unit


def events_table(result: Result) -> Html:
    """Faults and what was done about them, those that there were."""
    events = (result.get("replay") or {}).get("events") or {}
    rows = [[name.replace("_", " "), f"{count:,}"] for name, count in events.items() if number(count)]
    if not events:
        return Html("")
    if not rows:
        return paragraph("No faults, and no step went short of replay.")
    return table(["faults", "times"], rows)


def rejections_table(result: Result) -> Html:
    """Of a run whose teachers label their own images: what they sampled in vain, and the classes that they lack."""
    replay = result.get("replay") or {}
    if "rejected_images" not in replay:
        return Html("")
    rows = [["sampled and not used", f"{replay['rejected_images']:,}"]]
    lacking = sorted(replay.get("lacking", {}).items(), key=lambda item: int(item[0]))
    rows += [[f"too few of class {label}: filled otherwise", f"{count:,}"] for label, count in lacking]
    return table(["images of the teachers", "number"], rows)


def changed_table(source: Source) -> Html:
    """Settings that are not as they are by default."""
    rows = [[key, plain(value), plain(default)] for key, value, default in source.changed_settings()]
    return table(["setting", "value", "default"], rows, words=(1, 2)) if rows else paragraph("nothing")


def plain(value: Any) -> str:
    """A value of a configuration as its file writes it."""
    return value if isinstance(value, str) else json.dumps(value)
