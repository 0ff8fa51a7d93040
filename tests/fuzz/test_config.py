"""The configuration loader against files and command lines that nobody would write."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fuzz.mutate import NUMBERS, ODD, SNIPPETS, amount, byte_mutants, settled, tree_mutants
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.settings import (
    CONFIG_DIR,
    as_plain,
    check,
    check_world,
    config_from_run,
    load_config,
    refused_changes,
    restore_config,
)

FILES = sorted(CONFIG_DIR.glob("*.yaml"))
KEYS = [f"{section}.{key}" for section, values in asdict(Config()).items() for key in values]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def assert_sound(config: Config, path: Path) -> None:
    """It is one that may be run, and the run directory gives it back."""
    check(config)
    path.write_text(yaml.safe_dump(as_plain(config), sort_keys=False))  # as preflight writes it
    assert config_from_run(path) == config
    assert refused_changes(restore_config(path), as_plain(config)) == []


def load(path: Path, overrides: list[str], names: str) -> Config | None:
    return settled(lambda: load_config(str(path), overrides), names, ConfigError)


def try_file(folder: Path, data: bytes, accepted: list[bool]) -> None:
    """A file as a configuration, and as what a run directory kept."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(data)
    # What several keys together make impossible is told by their names alone.
    config = load(path, [], "")
    accepted.append(config is not None)
    if config is not None:
        assert_sound(config, folder / "config.yaml")
    kept = settled(lambda: restore_config(path), "fuzzed.yaml", ConfigError)
    if kept is not None:
        assert all("\n" not in line for line in refused_changes(kept, as_plain(Config())))
        settled(lambda: config_from_run(path), "", ConfigError)


@amount(400)
def test_bytes_of_a_file(tmp_path: Path, count: int) -> None:
    accepted: list[bool] = []
    for number, path in enumerate(FILES):
        for data in byte_mutants(path.read_bytes(), count // len(FILES), seed=number):
            try_file(tmp_path, data, accepted)
    assert 0.01 < sum(accepted) / len(accepted) < 0.9  # both outcomes are tried


@amount(300)
def test_structure_of_a_file(tmp_path: Path, count: int) -> None:
    whole = as_plain(load_config("digits", []))
    accepted: list[bool] = []
    for seed, tree in enumerate((whole, *(yaml.safe_load(path.read_text()) for path in FILES))):
        for mutant in tree_mutants(tree, count // (1 + len(FILES)), seed):
            try_file(tmp_path, dumped(mutant), accepted)
    assert 0.05 < sum(accepted) / len(accepted) < 0.9


def dumped(tree: Any) -> bytes:
    """As JSON, which is YAML, or as YAML with its own spellings of odd numbers."""
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(tree).encode()


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGE_BOMB,
        "a: &a [*a]",
        "train: &t {global_batch: 64}\nema: *t",
        "[" * 3000,
        "{a: " * 3000,
        "- " * 3000,
        "data: {tasks: " + "[" * 19 + "]" * 19 + "}",
        "run: {name: !!python/object/apply:os.system [touch hacked]}",
        "run: !!binary aGVsbG8=",
        "run: {seed: !!int x}",
        "? [a, b]\n: 1",
        "run: {seed: 0x" + "f" * 20000 + "}",
        "run: {seed: " + "9" * 20000 + "}",
        "optimizer: {lr: " + "1:" * 300 + "0.5}",
        "optimizer: {lr: 0x" + "f" * 400 + "}",
        "run: {name: ${run.name}}",
        "run: {name: '${oc.env:HOME}'}",
        "run: {name: '???'}",
        'run: {name: "\\ud800"}',
        'run: {name: "a\\nb"}',
        "run: {seed: 1, seed: 2}",
        "run: {}\nrun: {}",
        "a\u2028b: 1",
        '"a\\nb": 1',
        f"{'k' * 200_000}: 1",
        "x" * 1_000_000,
        "--- {}\n--- {}",
        "%YAML 9.9\n---\n{}",
        "\ufeff[]",
        "=: =",
        "run: =",
        "<<: {run: {name: [1]}}",
        "data: {classes: 1000000000000, classes_per_task: 1}",
        "diffusion: {timesteps: 1000000000000}",
        "train.global_batch: 3",
        "1: 2",
        "null: null",
        "true: {a: 1}",
    ],
)
def test_files_made_to_hurt(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_text(text)
    assert settled(lambda: load_config(str(path), []), "", ConfigError) is None
    kept = settled(lambda: restore_config(path), "fuzzed.yaml", ConfigError)
    assert kept is None or refused_changes(kept, as_plain(Config()))
    assert not (tmp_path / "hacked").exists() and not Path("hacked").exists()


SANE = (
    "train.log_every=7",
    "ema.decay=1e-3",
    "data.class_order_seed=3",
    "run.name=x y",
    "replay.device=",
    "run.seed=-1",
)


def override(rng: random.Random) -> str:
    """One argument, usually of a known key."""
    if rng.random() < 0.3:
        return rng.choice(SANE)
    key = rng.choice((rng.choice(KEYS), rng.choice(KEYS), rng.choice(KEYS), "", ".", "a.b.c", "train", "train.", "é.é"))
    odd = json.dumps(rng.choice(ODD)) if rng.random() < 0.5 else str(rng.choice(ODD))
    value = rng.choice((odd, odd, str(rng.choice(NUMBERS)), rng.choice(SNIPPETS).decode() + odd, "1", "0.5", "true"))
    return f"{key}={value}" if rng.random() < 0.95 else rng.choice((key, value, f"{key}=={value}", f"+{key}={value}"))


@amount(300)
def test_command_lines(tmp_path: Path, count: int) -> None:
    rng = random.Random(0)
    accepted = []
    for _ in range(count):
        arguments = [override(rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        config = settled(lambda given=arguments: load_config("digits", given), "", ConfigError)
        accepted.append(config is not None)
        if config is not None:
            assert_sound(config, tmp_path / "config.yaml")
    assert 0.05 < sum(accepted) / count < 0.9


@pytest.mark.parametrize(
    "name", ["", ".", "/", "\x00", "a\nb", "x" * 5000, "configs", "digits/x", "/dev/zero", "\ud800"]
)
def test_names_of_files(name: str) -> None:
    assert settled(lambda: load_config(name, []), "--config ", ConfigError) is None


@amount(400)
def test_worlds(count: int) -> None:
    """Any number of ranks either shares a step's samples out evenly or is refused by a key."""
    rng = random.Random(0)
    config = load_config("digits", [])
    accepted = []
    for _ in range(count):
        config.train.global_batch = rng.choice((1, 2, 6, 64, 252, 256, rng.randrange(1, 10**6)))
        config.train.micro_batch = rng.choice((0, 0, 1, 2, 7, 64, 10**9))
        config.replay.batch = rng.choice((0, 0, 1, 8, 64, 10**9))
        config.replay.device = rng.choice(("", "", "cpu", "cuda:0"))
        ranks, cuda = rng.choice((1, 1, 2, 3, 7, 8, 10**6)), rng.random() < 0.5
        fits = settled(lambda ranks=ranks, cuda=cuda: check_world(config, ranks, cuda) or True, "=", ConfigError)
        accepted.append(fits is True)
        if fits:
            local, micro = config.train.global_batch // ranks, config.train.micro_batch
            assert local * ranks == config.train.global_batch and config.replay_batch % ranks == 0
            assert not micro or (local % micro == 0 and config.replay_batch // ranks % (local // micro) == 0)
    assert 0.1 < sum(accepted) / count < 0.9
