"""Names of frames by their content."""

import numpy as np

from megagnn.data.formats.groups import content_name

RNG = np.random.default_rng(0)
FRAMES = [RNG.normal(scale=4, size=(20, 3)) for _ in range(200)]
NUMBERS, CELL = np.full(20, 6), 9.123456789 * np.eye(3)


def names(frames):
    return [content_name(NUMBERS, positions, CELL) for positions in frames]


def test_frames_a_thousandth_of_an_ångström_apart_differ():
    moved = [positions + 1e-3 * (np.arange(60).reshape(20, 3) == 7) for positions in FRAMES]
    assert not set(names(FRAMES)) & set(names(moved))
    stretched = {content_name(NUMBERS, positions, CELL + 1e-3 * np.eye(3)) for positions in FRAMES}
    assert not set(names(FRAMES)) & stretched
    assert content_name(NUMBERS + 1, FRAMES[0], CELL) != names(FRAMES)[0]


def test_noise_of_files_and_stores_does_not_matter():
    alike = [a == b for a, b in zip(names(FRAMES), names(np.round(FRAMES, 8)), strict=True)]
    assert np.mean(alike) > 0.98
    assert names(FRAMES) == names(np.array(FRAMES, dtype=np.float32))
    symmetric = np.array([[0.0, 0.0, 0.0], [0.90255, 0.90255, 0.90255]] * 10)  # where decimals end in 5
    assert names([symmetric]) == names([symmetric + 1e-9 * RNG.normal(size=(20, 3))])


def test_names_are_the_same_in_every_release():
    assert (
        content_name(np.array([8, 1, 1]), np.arange(9.0).reshape(3, 3) / 7, np.zeros((3, 3)))
        == "0d82e06d802a4d3e"
    )
