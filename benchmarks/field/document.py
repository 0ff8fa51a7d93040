"""The tables of docs/results.md, from the result files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catalogue import line, with_table
from quality.document import interval_text

from field.answers import COLUMNS
from field.rows import DATA, QUESTIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
TITLES = {
    "fd": "FD",
    "kld": "KLD",
    "bpd": "bits / dimension",
    "bpd_grown": "those of earlier tasks, grown by a factor of",
    "classifier": "accuracy of the classifier",
    "memorised": "copies of the buffer",
    "average_accuracy": "average accuracy",
    "forgetting_model_accuracy": "accuracy forgotten",
    "backward_transfer": "backward transfer",
    **{key: key for key in ("precision", "recall")},
}
FORMS = {
    **{"fd": "{:.1f}", "kld": "{:.3f}", "bpd_grown": "{:.3f}"},
    **dict.fromkeys(("average_accuracy", "forgetting_model_accuracy", "backward_transfer"), "{:.3f}"),
}
COMPARED = {"ratio": "{:.2f}", "difference": "{:+.3f}"}


def with_tables(text: str, results: Path) -> str:
    """The page with the table of each question and data set that was measured.

    Raises ValueError where its markers are missing.
    """
    for question in QUESTIONS:
        for data in DATA:
            path = results / f"methods_{question}_{data}.json"
            if path.exists():
                text = with_table(text, table(json.loads(path.read_text())), f"{question}-{data}")
    return text


def table(content: Mapping[str, Any]) -> str:
    """Markdown: the command, a row for each way to learn, and a row for each claim."""
    question = content["question"]["name"]
    head = head_of(question)
    lines = ["", f"    {content['command']}", "", line(head), line(["---", *["---:"] * (len(head) - 1)])]
    lines += [line(row_cells(question, row)) for row in content["rows"]]
    if content["answers"]:
        lines += ["", line(("claim", "measured (90 %)", "holds")), line(["---", "---:", "---"])]
        lines += [line(answer_cells(answer)) for answer in content["answers"]]
    return "\n".join(lines) + "\n\n"


def head_of(question: str) -> list[str]:
    """The titles of a question's columns."""
    bins = ["loss of earlier tasks, grown by a factor of, from the least to the most noisy timesteps"]
    titles = [TITLES[key] for key in COLUMNS[question]]
    return ["", "seeds", *titles, *(bins if question == "timesteps" else [])]


def row_cells(question: str, row: Mapping[str, Any]) -> list[str]:
    """A row of its table: means, and from the lowest to the highest seed."""
    cells = [row["row"], str(len(row["seeds"]))]
    for key in COLUMNS[question]:
        form, values = FORMS.get(key, "{:.2f}"), row["values"][key]
        span = f" ({form.format(values['min'])}..{form.format(values['max'])})" if len(row["seeds"]) > 1 else ""
        cells.append(form.format(values["mean"]) + span)
    if question == "timesteps":
        cells.append(" ".join(f"{value:.2f}" for value in row["loss_grown"]))
    return cells


def answer_cells(answer: Mapping[str, Any]) -> list[str]:
    """A claim, what was measured, and whether it holds."""
    text = interval_text(answer["measured"], COMPARED[answer["kind"]])
    return [answer["claim"], text, answer["verdict"]]
