"""Loading and refusing configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.settings import as_plain, check_world, config_from_run, load_config, refused_changes, task_classes


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_then_yaml_then_dotlist(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "train: {global_batch: 32, log_every: 7}\nema: {decay: 0.9}\n")
    config = load_config(path, ["train.log_every=3"])
    assert (config.train.global_batch, config.train.log_every, config.ema.decay) == (32, 3, 0.9)
    assert config.optimizer.lr == 2e-4
    assert config.run.name == "mine-generative_distillation"
    assert config.data.tasks == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_a_penalty_is_part_of_the_name_of_a_run() -> None:
    assert load_config("digits", ["method.penalty=rank1_ewc"]).run.name == "digits-generative_distillation-rank1_ewc"
    assert load_config("digits", ["method.name=ewc", "method.penalty_weight=3"]).run.name == "digits-ewc"


def test_an_empty_value_empties(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "data: {source_path: somewhere}\n")
    assert load_config(path, ["data.source_path="]).data.source_path == ""


@pytest.mark.parametrize(
    "overrides",
    [
        ["replay.placement=external", "replay.workers=2"],
        ["replay.placement=inline", "replay.timeout=3"],
        ["diffusion.schedule=cosine", "diffusion.beta_end=0.03"],
        ["data.tasks=[[0,1]]", "data.classes_per_task=5"],
        ["model.conditional=false", "model.max_classes=20"],
        ["replay.on_starved=wait", "replay.reuse_cap=2"],
        ["evaluation.bpd_images=0", "evaluation.bpd_timesteps=7"],
        ["evaluation.loss_images=0", "evaluation.timestep_bins=7"],
        ["evaluation.probe_images=0", "evaluation.probe_timesteps=[7]"],
        ["evaluation.probe_images=0", "evaluation.probe_neighbours=7"],
        ["replay.placement=external", "replay.hang_timeout=9"],
        ["replay.placement=inline", "replay.timesteps=stratified"],
        ["replay.points=trajectory", "replay.timesteps=stratified"],
        ["replay.points=renoised", "replay.jitter=false"],
        ["method.penalty=none", "method.penalty_weight=2"],
        ["method.penalty=none", "method.fisher_images=9"],
        ["method.penalty=l2", "method.fisher_draws=9"],
        ["method.buffer=class_balanced", "method.buffer_size=9"],
        ["method.name=partial_generation", "replay.points=trajectory"],
        ["method.name=partial_generation", "replay.timesteps=stratified"],
        ["method.name=gaussian_distillation", "replay.steps=5"],
        ["method.buffer=reservoir", "method.buffer_per_class=9"],
        ["classifier.epochs=0", "classifier.batch=9"],
        ["classifier.epochs=0", "classifier.temperature=3"],
        ["method.name=joint", "classifier.temperature=3", "classifier.epochs=1"],
        ["method.name=experience_replay", "classifier.replay_images=9", "classifier.epochs=1"],
        ["method.name=experience_replay", "method.share=classes"],
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=f"{overrides[1].split('=')[0]} has no effect with {overrides[0].split('=')[0]}"
    ):
        load_config("digits", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.labelled=1", "jdcl.fixmatch_weight=1"],
        ["data.labelled=1", "jdcl.fixmatch_threshold=0.5"],
        ["jdcl.fixmatch_weight=0", "jdcl.fixmatch_threshold=0.5", "data.labelled=0.5"],
        ["jdcl.strong_operations=0", "jdcl.strong_magnitude=3"],
    ],
)
def test_settings_without_effect_on_a_classifier_within_the_model(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{overrides[1].split('=')[0]} has no effect with {overrides[0]}"):
        load_config("jdcl_digits", overrides)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.conditional=true", r"evaluation\.probe_images=4: .*model\.conditional"),
        ("evaluation.probe_timesteps=[]", r"evaluation\.probe_timesteps=\[\]: "),
        ("evaluation.probe_timesteps=[5,5]", r"evaluation\.probe_timesteps=\[5, 5\]: "),
        ("evaluation.probe_timesteps=[-1,5]", r"evaluation\.probe_timesteps=\[-1, 5\]: "),
        ("evaluation.probe_timesteps=[5,300]", r"evaluation\.probe_timesteps=.*diffusion\.timesteps=300"),
        ("evaluation.probe_neighbours=9", r"evaluation\.probe_neighbours=9: more than the 8 images"),
        ("evaluation.probe_neighbours=0", r"evaluation\.probe_neighbours=0: "),
        ("evaluation.probe_images=-1", r"evaluation\.probe_images=-1: "),
    ],
)
def test_probes_that_cannot_learn_are_refused(override: str, named: str) -> None:
    probed = ["model.conditional=false", "diffusion.timesteps=300", "evaluation.probe_images=4"]
    load_config("digits", [*probed, "evaluation.probe_timesteps=[0,299]", "evaluation.probe_neighbours=8"])
    with pytest.raises(ConfigError, match=named):
        load_config("digits", [*probed, override])


def test_a_classifier_weighs_the_buffer_by_the_share() -> None:
    overrides = ["method.name=experience_replay", "method.share=classes", "classifier.epochs=1", "classifier.lr=1e-3"]
    assert load_config("digits", overrides).classifier.lr == 1e-3


def test_config_is_also_looked_for_in_configs() -> None:
    assert load_config("digits", []).data.image_size == 8
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file.*digits.yaml"):
        load_config("nowhere.yaml", [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.images_per_task=3", "unknown key trian.images_per_task; did you mean train.images_per_task"),
        ("train.images_per_tsk=3", "did you mean train.images_per_task"),
        ("train.images_per_task=many", "train.images_per_task: .*could not be converted to Integer"),
        ("method.name=magic", "method.name: Invalid value 'magic'"),
        ("train=3", "train is a section"),
        ("method", "not of the form section.key=value"),
        ("data.tasks=[[0,", "command line"),
        ("data.classes_per_task=3", "data.classes_per_task=3: data.classes=10 does not divide"),
        ("data.tasks=[[0,1],[1]]", "data.tasks: class 1 occurs twice"),
        ("data.tasks=[[12]]", "data.tasks: class 12"),
        ("data.tasks=[[]]", "data.tasks: task 1 has no class"),
        ("data.channels=4", "data.channels=4"),
        ("zero.stage=4", "zero.stage=4"),
        ("optimizer.lr=0", "optimizer.lr=0"),
        ("ema.decay=1.0", "ema.decay=1.0"),
        ("replay.steps=2000", "replay.steps=2000"),
        ("replay.guidance=2", "replay.guidance=2.0: needs model.conditional=true and model.label_dropout above 0"),
        ("evaluation.guidance=0.5", "evaluation.guidance=0.5: needs .* model.label_dropout"),
        ("replay.solver=euler", "replay.solver: Invalid value 'euler'"),
        ("evaluation.guidance=-1", "evaluation.guidance=-1.0: must not be negative"),
        (
            "method.name=lwf",
            "replay.placement=subprocess: lwf asks the teacher about the trainer's own batch",
        ),
        ("model.label_dropout=1", "model.label_dropout=1.0"),
        ("cluster.timeout=5", "cluster.timeout=5.0: must be at least 10 s"),
        ("cluster.timeout=1e6", "cluster.timeout=1000000.0: must not be above 86400 s"),
        ("cluster.timeout=inf", "cluster.timeout=inf: is no finite number"),
        ("classifier.epochs=-1", "classifier.epochs=-1: must not be negative"),
        ("classifier.replay_images=-1", "classifier.replay_images=-1: must not be negative"),
        ("classifier.temperature=0", "classifier.temperature=0.0: must be above 0"),
        ("classifier.batch=0", "classifier.batch=0: must be above 0"),
        ("classifier.lr=0", "classifier.lr=0.0: must be above 0"),
        ("model.max_classes=5", "model.max_classes=5"),
        ("data.labelled=0", r"data.labelled=0.0: must be in \(0, 1\]"),
        ("data.labelled=1.5", r"data.labelled=1.5: must be in \(0, 1\]"),
        ("data.labelled=0.5", "data.labelled=0.5: only a classifier within the model"),
        ("jdcl.weak_crop=0", r"jdcl.weak_crop=0.0: must be in \(0, 1\]"),
        ("jdcl.fixmatch_threshold=1.1", r"jdcl.fixmatch_threshold=1.1: must be in \(0, 1\]"),
        ("jdcl.fixmatch_weight=-1", "jdcl.fixmatch_weight=-1.0: must not be negative"),
        ("jdcl.strong_operations=-1", "jdcl.strong_operations=-1: must not be negative"),
        ("jdcl.strong_magnitude=-1", "jdcl.strong_magnitude=-1: must not be negative"),
        ("jdcl.strong_magnitude=31", "jdcl.strong_magnitude=31: above 30"),
        ("train.images_per_task=3", "train.images_per_task=3"),
    ],
)
def test_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("digits", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["zero.stage=0", "train.precision=bf16"],
        ["method.name=ewc", "method.penalty=l2"],
        ["method.name=partial_generation", "replay.steps=4", "replay.points_per_trajectory=5"],
        ["method.name=lwf", "replay.placement=inline", "replay.batch=32"],
        ["method.penalty=ewc", "method.fisher_images=0"],
        ["method.penalty=ewc", "method.penalty_weight=-1"],
        ["method.name=experience_replay", "method.buffer=reservoir", "method.buffer_size=0"],
        ["method.name=generative_replay", "replay.points=trajectory"],
        ["replay.placement=inline", "replay.points=trajectory"],
        ["method.name=generative_replay", "replay.points=both"],
        ["replay.placement=inline", "replay.points=both"],
        ["replay.points=trajectory", "replay.steps=4", "replay.points_per_trajectory=5"],
        ["replay.placement=inline", "replay.reuse=2"],
        ["model.conditional=false", "model.label_dropout=0.1"],
        ["model.conditional=false", "model.label_dropout=0.1", "replay.guidance=2"],
    ],
)
def test_impossible_combinations(overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        load_config("digits", overrides)


@pytest.mark.parametrize("section", ["replay", "evaluation"])
def test_a_solver_without_noise_is_refused_it(section: str) -> None:
    wanted = [f"{section}.solver=dpmpp", f"{section}.eta=0.5"]
    with pytest.raises(ConfigError, match=rf"^{section}\.eta=0\.5: {section}\.solver=dpmpp adds no noise"):
        load_config("digits", wanted)
    other = {"replay": "evaluation", "evaluation": "replay"}[section]
    load_config("digits", [wanted[0], f"{other}.eta=0.5"])


def test_half_of_both_kinds_of_points_must_fit_on_the_path() -> None:
    both = ["replay.points=both", "replay.steps=4"]
    assert load_config("digits", [*both, "replay.points_per_trajectory=6", "replay.timesteps=stratified"])
    with pytest.raises(ConfigError, match=r"replay\.points_per_trajectory=7: 4 of them .* replay\.steps=4"):
        load_config("digits", [*both, "replay.points_per_trajectory=7"])


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    for text in ("a: [1", "- 1\n- 2\n", "train: {global_batch: [1]}", "\x00"):
        path = write(tmp_path / "broken.yaml", text)
        with pytest.raises(ConfigError, match=r"broken\.yaml"):
            load_config(path, [])


@pytest.mark.parametrize(
    ("overrides", "trainers", "key"),
    [
        (["train.global_batch=64"], 3, "train.global_batch=64"),
        (["replay.batch=30"], 4, "replay.batch=30"),
        (["train.micro_batch=24"], 1, "train.micro_batch=24"),
        (["train.micro_batch=16", "replay.batch=6"], 1, "train.micro_batch=16"),
        (["train.precision=fp16"], 1, "train.precision=fp16"),
        (["replay.device=cuda:1"], 1, "replay.device=cuda:1"),
    ],
)
def test_refused_on_this_machine(overrides: list[str], trainers: int, key: str) -> None:
    config = load_config("digits", overrides)
    with pytest.raises(ConfigError, match=key):
        check_world(config, trainers, cuda=False)


def test_a_run_from_before_there_was_a_key_goes_on(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "one.yaml", "data: {classes: 4}"), [])
    old = as_plain(config)
    del old["replay"]["guidance"], old["model"]["label_dropout"]
    assert refused_changes(old, as_plain(config)) == []
    config.replay.guidance = 2.0
    assert refused_changes(old, as_plain(config)) == ["replay.guidance (1.0 -> 2.0)"]


def test_what_may_change_between_attempts(tmp_path: Path) -> None:
    first = load_config("digits", ["data.tasks=[[0,1],[2,3]]"])
    again = load_config("digits", ["data.tasks=[[0,1],[2,3],[4,5]]", "zero.stage=2", "cluster.timeout=60"])
    assert refused_changes(as_plain(first), as_plain(again)) == []
    other = load_config("digits", ["data.tasks=[[0,1],[2,4]]", "train.global_batch=32", "optimizer.lr=1"])
    refused = refused_changes(as_plain(first), as_plain(other))
    assert [line.split()[0] for line in refused] == ["optimizer.lr", "train.global_batch", "data.tasks"]


def test_resolved_config_reads_back(tmp_path: Path) -> None:
    import yaml

    config = load_config("digits", ["data.class_order_seed=3", "train.precision=bf16"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_plain(config)))
    assert config_from_run(tmp_path / "config.yaml") == config


def test_class_order_is_a_function_of_its_seed() -> None:
    split = [task_classes(load_config("digits", [f"data.class_order_seed={seed}"]).data) for seed in (1, 1, 2)]
    assert split[0] == split[1] != split[2]
    assert sorted(label for task in split[0] for label in task) == list(range(10))
