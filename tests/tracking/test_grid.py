"""Pictures, pixel by pixel where it matters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from trainer.tracking.grid import (
    WRONG,
    ClassSamples,
    history_grid,
    load_samples,
    pick_samples,
    sample_grid,
    save_png,
    save_samples,
)

TASKS = [[0, 1], [2, 3]]
NAMES = ["zero", "one", "two", "a class with a very long name indeed"]


def coloured(count: int, size: int = 8, channels: int = 3) -> np.ndarray:
    """Image i is one colour, all different."""
    pixels = np.zeros((count, channels, size, size), dtype=np.uint8)
    pixels[:] = (np.arange(count * channels) * 7 % 200 + 40).reshape(count, channels, 1, 1)
    return pixels


def picked(asked: bool = True) -> ClassSamples:
    labels = np.array([0, 0, 0, 1, 2, 2, 3, 3])
    predicted = labels.copy()
    predicted[1] = 3
    return pick_samples(coloured(8), labels if asked else None, predicted, [0, 1, 2, 3], 2)


def count_pixels(image: Image.Image, colour: tuple[int, ...]) -> int:
    return int((np.asarray(image) == np.array(colour)).all(axis=-1).sum())


def test_samples_are_picked_by_class_asked_for_or_predicted() -> None:
    chosen = picked()
    np.testing.assert_array_equal(chosen.count, [2, 1, 2, 2])
    np.testing.assert_array_equal(chosen.images[0], coloured(8)[:2])
    np.testing.assert_array_equal(chosen.predicted, [[0, 3], [1, -1], [2, 2], [3, 3]])
    by_prediction = picked(asked=False)
    np.testing.assert_array_equal(by_prediction.images[3], coloured(8)[[1, 6]])
    np.testing.assert_array_equal(by_prediction.images[0], coloured(8)[[0, 2]])


def test_saved_samples_come_back(tmp_path: Path) -> None:
    save_samples(tmp_path / "samples.npz", picked())
    again = load_samples(tmp_path / "samples.npz")
    assert again.classes == (0, 1, 2, 3) and again.asked
    np.testing.assert_array_equal(again.images, picked().images)
    np.testing.assert_array_equal(again.predicted, picked().predicted)
    np.testing.assert_array_equal(again.count, picked().count)


def test_every_sample_is_shown_enlarged_pixel_by_pixel() -> None:
    chosen = picked(asked=False)  # no frames
    grid = sample_grid(chosen, TASKS, NAMES, "title")
    for row in range(4):
        for nth in range(int(chosen.count[row])):
            colour = tuple(int(v) for v in chosen.images[row, nth, :, 0, 0])
            assert count_pixels(grid, colour) == 48 * 48
    checker = np.indices((8, 8)).sum(axis=0) % 2 * 255
    samples = pick_samples(checker.astype(np.uint8)[None, None], np.array([0]), np.array([0]), [0], 1)
    shown = np.asarray(sample_grid(samples, [[0]], ["x"], ""))[:, :, 0]
    large = checker.repeat(6, axis=0).repeat(6, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(shown, (48, 48))
    assert (windows == large).all(axis=(2, 3)).sum() == 1


def test_wrong_class_is_framed_only_where_a_class_was_asked_for() -> None:
    assert count_pixels(sample_grid(picked(), TASKS, NAMES, ""), WRONG) == 48 * 48 - 44 * 44
    assert count_pixels(sample_grid(picked(asked=False), TASKS, NAMES, ""), WRONG) == 0


def test_many_classes_stand_in_blocks() -> None:
    labels = np.repeat(np.arange(50), 2)
    samples = pick_samples(coloured(100, size=32), labels, labels, range(50), 2)
    grid = sample_grid(samples, [list(range(i, i + 10)) for i in range(0, 50, 10)], [str(i) for i in range(50)], "t")
    assert grid.height < 20 * 70 + 120 and grid.width > 3 * 2 * 64


def test_history_has_a_row_for_each_task_and_blanks_for_what_is_not_learnt() -> None:
    first = pick_samples(coloured(2), np.array([0, 1]), np.array([0, 1]), [0, 1], 2)
    grid = history_grid([first, picked()], TASKS, NAMES, "t", real=picked())
    alone = history_grid([first], TASKS, NAMES, "t")
    assert grid.height - alone.height == 2 * (48 + 2 + 4) and grid.width > alone.width
    colour = tuple(int(v) for v in coloured(8)[6, :, 0, 0])  # of task 2: real and after task 2, not after task 1
    assert count_pixels(grid, colour) == 2 * 48 * 48
    assert count_pixels(alone, colour) == 0


def test_png_is_written(tmp_path: Path) -> None:
    grid = sample_grid(picked(), TASKS, NAMES, "t")
    save_png(tmp_path / "tasks" / "samples.png", grid)
    with Image.open(tmp_path / "tasks" / "samples.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(grid))
