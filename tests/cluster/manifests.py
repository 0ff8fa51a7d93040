"""The manifests of launch/k8s, as tests read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).resolve().parent.parent.parent / "launch" / "k8s"
FILES = sorted(path for path in DIRECTORY.glob("*.yaml") if path.name != "kustomization.yaml")


def documents() -> list[dict[str, Any]]:
    """Every object of every file."""
    return [content for path in FILES for content in yaml.safe_load_all(path.read_text())]


def named(kind: str, name: str) -> dict[str, Any]:
    found = [content for content in documents() if (content["kind"], content["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{kind} {name}: {len(found)} times"
    return found[0]


@dataclass(frozen=True)
class Job:
    """An Indexed Job with one container."""

    name: str

    @property
    def spec(self) -> dict[str, Any]:
        return named("Job", self.name)["spec"]

    @property
    def pod(self) -> dict[str, Any]:
        return self.spec["template"]["spec"]

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.pod["containers"]
        return container

    def environment(self, index: int) -> dict[str, str]:
        """What a pod's processes find, the index that Kubernetes itself gives them included."""
        given = {entry["name"]: entry["value"] for entry in self.container["env"]}
        return given | {"JOB_COMPLETION_INDEX": str(index)}

    def command(self, index: int) -> list[str]:
        """What a pod starts: command and args, with $(NAME) filled in as Kubernetes does it."""
        words = [*self.container["command"], *self.container["args"]]
        return [fill_in(word, self.environment(index)) for word in words]


def fill_in(word: str, environment: Mapping[str, str]) -> str:
    """$(NAME) by its value; a name that is not known stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), word)


TRAINER = Job("palimpsest-trainer")
SIDECAR = Job("palimpsest-sidecar")
