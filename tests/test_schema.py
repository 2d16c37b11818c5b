"""Claims about the settings: what loads, what is refused, and that a refusal is one line with thing, value and rule."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradine.configs import schema
from gradine.configs.schema import Data, Run, UserError, as_dict, dump, flatten, from_dict, load, shard_settings

RECIPE = """
name: small
data: {source: images, shards: shards/small}
network: {latent_size: 8, fmap_base: 64, fmap_max: 8}
stages:
  - {resolution: 4, hold_images: 1_000, batch_size: 8}
  - {resolution: 8, fade_images: 2_000, hold_images: 3_000, batch_size: 16}
  - {resolution: 16, batch_size: 24, learning_rate: 0.002}
presets:
  two: {stages.*.workers: 2, stages.0.batch_size: 16, training.seed: 7}
  big: {network.fmap_max: 16}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- What loads


def test_a_recipe_sets_what_it_names_and_leaves_the_rest_at_the_defaults(recipe: Path) -> None:
    run = load(recipe)
    assert run.name == "small"
    assert [s.resolution for s in run.stages] == [4, 8, 16]
    assert [s.batch_size for s in run.stages] == [8, 16, 24]
    assert [s.hold_images for s in run.stages] == [1_000, 3_000, 600_000]
    assert [s.learning_rate for s in run.stages] == [0.001, 0.001, 0.002]
    assert run.final_resolution == 16
    assert (run.network.latent_size, run.network.fmap_base, run.network.fmap_max) == (8, 64, 8)


def test_the_defaults_are_those_of_the_paper() -> None:
    run = from_dict({"name": "x", "data": {"source": "a", "shards": "b"}, "stages": [{"resolution": 4}]})
    assert (run.network.latent_size, run.network.fmap_base, run.network.fmap_max) == (512, 8192, 512)
    assert run.network.pool_before_activation is False
    t, stage = run.training, run.stages[0]
    assert (t.penalty_weight, t.penalty_target, t.penalty_at, t.drift) == (10, 1, "current", 0.001)
    assert (t.beta1, t.beta2, t.average_half_life, t.mirror) == (0.0, 0.99, 10_000, True)
    assert type(t.beta1) is float  # torch refuses betas of mixed types
    assert (stage.fade_images, stage.hold_images, stage.learning_rate) == (600_000, 600_000, 0.001)


@pytest.mark.parametrize("name", [path.relative_to(schema.RECIPES).with_suffix("").as_posix()
                                  for path in sorted(schema.RECIPES.rglob("*.yaml"))])
def test_every_bundled_recipe_loads_by_name_and_with_each_of_its_presets(name: str) -> None:
    path, given = schema.RECIPES / f"{name}.yaml", ["data.source=images"]  # only the demo images come along
    run = load(name, given)
    assert run == load(path, given)
    assert run.stages[0].resolution == 4 or run.network.kind != "progressive"
    for preset in yaml.safe_load(path.read_text()).get("presets", {}):
        assert load(name, [*given, f"preset={preset}"]).preset == str(preset)


def test_a_star_reaches_every_stage_and_an_index_reaches_one(recipe: Path) -> None:
    run = load(recipe, ["stages.*.micro_batch=4", "stages.1.learning_rate=0.003", "stages.2.workers=3"])
    assert [s.micro_batch for s in run.stages] == [4, 4, 4]
    assert [s.learning_rate for s in run.stages] == [0.001, 0.003, 0.002]
    assert [s.workers for s in run.stages] == [1, 1, 3]
    assert [s.batch_size for s in run.stages] == [8, 16, 24]


def test_the_last_of_two_overrides_of_one_key_counts(recipe: Path) -> None:
    assert load(recipe, ["training.seed=1", "training.seed=2"]).training.seed == 2
    assert load(recipe, ["stages.0.batch_size=4", "stages.*.batch_size=12"]).stages[0].batch_size == 12


def test_an_override_reaches_a_section_the_recipe_does_not_have(recipe: Path) -> None:
    assert load(recipe, ["evaluation.samples=9"]).evaluation.samples == 9


def test_a_list_given_as_an_override_replaces_the_whole_list(recipe: Path) -> None:
    run = load(recipe, ["stages=[{resolution: 8, batch_size: 4}]"])
    assert [(s.resolution, s.batch_size, s.hold_images) for s in run.stages] == [(8, 4, 600_000)]


def test_an_override_value_is_read_as_yaml(recipe: Path) -> None:
    run = load(recipe, ["training.mirror=false", "training.drift=2e-3", "name='7'", "ray.address=''"])
    assert (run.training.mirror, run.training.drift, run.name, run.ray.address) == (False, 0.002, "7", "")


def test_a_preset_changes_what_it_lists_and_an_override_beats_it(recipe: Path) -> None:
    plain, two = load(recipe), load(recipe, ["preset=two"])
    changed = {key for key, value in flatten(as_dict(two)).items() if flatten(as_dict(plain))[key] != value}
    assert changed == {"preset", "training.seed", "stages.0.batch_size",
                       "stages.0.workers", "stages.1.workers", "stages.2.workers"}
    assert (two.preset, two.training.seed, two.stages[0].batch_size, two.stages[2].workers) == ("two", 7, 16, 2)
    assert load(recipe, ["training.seed=3", "preset=two"]).training.seed == 3


def test_a_recipe_may_name_its_preset_and_the_command_line_another(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", RECIPE + "preset: two\n")
    assert load(path).stages[1].workers == 2
    other = load(path, ["preset=big"])
    assert (other.preset, other.stages[1].workers, other.network.fmap_max) == ("big", 1, 16)


def test_a_preset_may_be_called_by_a_number(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", RECIPE + "  4: {training.seed: 44}\n")
    assert load(path, ["preset=4"]).training.seed == 44


@pytest.mark.parametrize("overrides", [[], ["preset=two"], ["training.drift=1e-5", "resume=8", "name='1'"]])
def test_a_dumped_run_loads_back_equal(recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    run = load(recipe, overrides)
    again = load(written(tmp_path / "config.yaml", dump(run)))
    assert again == run
    assert from_dict(as_dict(run)) == run


def test_a_dump_writes_out_every_default(recipe: Path) -> None:
    stored = yaml.safe_load(dump(load(recipe)))
    assert stored["training"]["beta2"] == 0.99
    assert stored["stages"][0]["cpus"] == 1.0
    assert set(stored) == {f.name for f in dataclasses.fields(Run)}


def test_a_run_cannot_be_changed_after_it_was_checked(recipe: Path) -> None:
    run = load(recipe)
    for part, name in ((run, "name"), (run.training, "seed"), (run.stages[0], "batch_size"), (run.network, "fmap_max"),
                       (run.data, "crop"), (run.checkpoints, "keep"), (run.evaluation, "count"), (run.ray, "address")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, getattr(part, name))


def test_flatten_names_every_leaf_by_its_path() -> None:
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": "x"}) == {"a.b.0": 1, "a.b.1.c": 2, "d": "x"}


# ---- What is refused


@pytest.mark.parametrize(("override", "path", "meant"), [
    ("trainin.seed=1", "trainin", "training"),
    ("training.sed=1", "training.sed", "seed"),
    ("stages.1.batchsize=8", "stages.1.batchsize", "batch_size"),
    ("evaluation.sample=1", "evaluation.sample", "samples"),
])
def test_an_unknown_key_is_answered_with_did_you_mean(recipe: Path, override: str, path: str, meant: str) -> None:
    message = refusal(recipe, override)
    assert message.startswith(f"{path} is not a setting; did you mean '{meant}'?")
    assert "Known: " in message


def test_an_unknown_key_that_resembles_nothing_still_lists_the_known_ones(recipe: Path) -> None:
    message = refusal(recipe, "checkpoints.zzz=1")
    assert message == ("checkpoints.zzz is not a setting. Known: every_images, keep, best, pin, location, "
                       "background, retry_s.")


@pytest.mark.parametrize(("override", "parts"), [
    ("training.seed=abc", ["training.seed", "'abc'", "Integer"]),
    ("training.seed=1e5", ["training.seed", "100000.0", "Integer", "100_000, not 1e5"]),
    ("training.seed=16.5", ["training.seed", "16.5", "Integer"]),
    ("training.seed=true", ["training.seed", "True", "Integer"]),
    ("training.beta1=low", ["training.beta1", "'low'", "Float"]),
    ("training.mirror=perhaps", ["training.mirror", "'perhaps'", "bool"]),
    ("name=", ["name", "None", "str"]),
    ("data=null", ["data", "Optional"]),
    ("data=5", ["data", "key: value", "source"]),
    ("stages=4", ["stages=4", "list"]),
    ("stages={}", ["stages={}", "list"]),
    ("stages.1.batch_size=8.5", ["stage 8px: batch_size", "8.5", "Integer"]),
    ("stages.1.resolution=8.0", ["resolution", "8.0", "Integer"]),
    ("stages=[4,8]", ["stages.0", "key: value", "resolution"]),
])
def test_a_wrong_type_names_the_key_the_value_and_the_type(recipe: Path, override: str, parts: list[str]) -> None:
    message = refusal(recipe, override)
    for part in parts:
        assert part in message, message
    assert ".." not in message


def test_whole_numbers_may_carry_underscores(recipe: Path) -> None:
    run = load(recipe, ["checkpoints.every_images=800_000"])
    assert run.checkpoints.every_images == 800_000
    assert type(run.checkpoints.every_images) is int


@pytest.mark.parametrize(("override", "named", "rule"), [
    ("training.beta1=1", "training.beta1=1.0", "0 <= beta1 < 1"),
    ("training.beta1=-0.1", "training.beta1=-0.1", "0 <= beta1 < 1"),
    ("training.beta2=1", "training.beta2=1.0", "0 < beta2 < 1"),
    ("training.beta2=0", "training.beta2=0.0", "0 < beta2 < 1"),
    ("training.penalty_target=0", "training.penalty_target=0.0", "positive"),
    ("training.average_half_life=0", "training.average_half_life=0", "positive"),
    ("training.lr_ramp_images=-1", "training.lr_ramp_images=-1", "not be negative"),
    ("training.penalty_at=finall", "training.penalty_at='finall'", "did you mean 'final'? Use one of: current, final."),
    ("training.precision=fp16", "training.precision='fp16'", "Use one of: auto, float32, bfloat16."),
    ("stages.0.precision=auto", "stage 4px: precision='auto'", "Use one of: float32, bfloat16."),
    ("data.crop=center", "data.crop='center'", "did you mean 'centre'? Use one of: centre, none, tile, random-4."),
    ("data.crop=random-0", "data.crop='random-0'", "Use one of: centre, none, tile, random-4."),
    ("data.channels=4", "data.channels=4", "use 3 for colour or 1 for gray"),
    ("data.small=enlarge", "data.small='enlarge'", "reject, upscale, pad"),
    ("data.sampling=even", "data.sampling='even'", "raw, balanced"),
    ("data.labels=folder", "data.labels='folder'", "did you mean 'folders'? Use one of: auto, folders, none"),
    ("data.encoding=raw:64", "data.encoding='raw:64'", "kind:px,...,kind with rising px, e.g. raw:64,jpeg"),
    ("data.encoding=raw:64,webp:32,png", "webp:32", "kind:px,...,kind with rising px"),
    ("data.encoding=raw:0,png", "raw:0", "kind:px,...,kind with rising px"),
    ("data.encoding=raw:64,jpg", "data.encoding='jpg'", "did you mean 'jpeg'? Use one of: raw, png, webp, jpeg"),
    ("data.shard_images=0", "data.shard_images=0", "positive"),
    ("data.deadline_s=0", "data.deadline_s=0", "positive"),
    ("data.cache_gb=-1", "data.cache_gb=-1", "not be negative"),
    ("data.download_gb=-1", "data.download_gb=-1", "not be negative"),
    ("data.max_rejected_share=1", "data.max_rejected_share=1.0", "0 <= share < 1"),
    ("network.latent_size=0", "network.latent_size=0", "positive"),
    ("network.fmap_max=-2", "network.fmap_max=-2", "positive"),
    ("network.kind=dcgn", "network.kind='dcgn'", "did you mean 'dcgan'?"),
    ("network.latents=normal", "network.latents='normal'", "gaussian, uniform, sphere"),
    ("network.output=sigmoid", "network.output='sigmoid'", "linear, tanh"),
    ("network.conditioning=joined", "network.conditioning='joined'", "none, concatenated, projection, auxiliary"),
    ("network.codes=-1", "network.codes=-1", "not be negative"),
    ("network.continuous_codes=-1", "network.continuous_codes=-1", "not be negative"),
    ("network.layers.upsampling=bilinear", "network.layers.upsampling='bilinear'", "transposed, nearest, shuffle"),
    ("network.layers.pooling=max", "network.layers.pooling='max'", "stride, mean"),
    ("network.layers.generator_norm=virtual", "network.layers.generator_norm='virtual'", "batch, instance, pixel"),
    ("network.layers.discriminator_norm=pixel", "network.layers.discriminator_norm='pixel'", "instance, virtual"),
    ("network.layers.generator_activation=elu", "network.layers.generator_activation='elu'", "relu, leaky_relu"),
    ("network.layers.minibatch=std", "network.layers.minibatch='std'", "none, stddev, discrimination"),
    ("network.layers.dropout=1", "network.layers.dropout=1.0", "0 <= dropout < 1"),
    ("network.mlp.width=0", "network.mlp.width=0", "positive"),
    ("network.mlp.depth=0", "network.mlp.depth=0", "positive"),
    ("data.points.kind=circle", "data.points.kind='circle'", "none, gaussian, ring, grid"),
    ("data.points.kind=ring", "data.channels=3", "Use data.channels=2"),
    ("data.points.modes=1", "data.points.modes=1", "at least 2"),
    ("data.points={kind: grid, modes: 8}", "data.points.modes=8", "a square number such as 25"),
    ("data.points.mean=[0]", "data.points.mean=[0.0]", "two numbers, [x, y]"),
    ("data.points.deviations=[1, .nan]", "data.points.deviations=[1.0, nan]", "two numbers, [x, y]"),
    ("data.points.deviations=[1, 0]", "data.points.deviations=[1.0, 0.0]", "positive"),
    ("data.points.radius=0", "radius=0.0", "positive"),
    ("data.points.correlation=1", "data.points.correlation=1.0", "between -1 and 1"),
    ("training.loss=hing", "training.loss='hing'", "did you mean 'hinge'?"),
    ("training.penalty=r2", "training.penalty='r2'", "gradient, r1, r1+r2, none"),
    ("training.optimizer=rmsprop", "training.optimizer='rmsprop'", "adam, sgd"),
    ("training.augment=never", "training.augment='never'", "none, always, adaptive"),
    ("training.clip=-1", "training.clip=-1.0", "not be negative"),
    ("training.diversity=-1", "training.diversity=-1.0", "not be negative"),
    ("training.d_steps=0", "training.d_steps=0", "at least 1"),
    ("training.g_steps=0", "training.g_steps=0", "at least 1"),
    ("training.real_labels=[1.2, 0.7]", "training.real_labels=[1.2, 0.7]", "the two it is drawn between"),
    ("training.fake_labels=[]", "training.fake_labels=[]", "give one target"),
    ("training.fake_labels=[.nan]", "training.fake_labels=[nan]", "give one target"),
    ("training.flip_labels=0.5", "training.flip_labels=0.5", "0 <= flip_labels < 0.5"),
    ("training.momentum=1", "training.momentum=1.0", "0 <= momentum < 1"),
    ("training.discriminator_rate=0", "training.discriminator_rate=0.0", "positive"),
    ("training.likelihood_std=0", "training.likelihood_std=0.0", "positive"),
    ("stages.1.batch_size=0", "stage 8px: batch_size=0", "positive"),
    ("stages.1.workers=0", "stage 8px: workers=0", "positive"),
    ("stages.1.learning_rate=0", "stage 8px: learning_rate=0.0", "positive"),
    ("stages.1.learning_rate=.nan", "stage 8px: learning_rate=nan", "positive"),
    ("stages.1.fade_images=-1", "stage 8px: fade_images=-1", "not be negative"),
    ("stages.1.hold_images=-1", "stage 8px: hold_images=-1", "not be negative"),
    ("stages.1.micro_batch=-4", "stage 8px: micro_batch=-4", "not be negative"),
    ("stages.1.threads=-1", "stage 8px: threads=-1", "not be negative"),
    ("stages.1.cpus=-1", "stage 8px: cpus=-1.0", "not be negative"),
    ("stages.1.gpus=-1", "gpus=-1.0", "not be negative"),
    ("stages.1.resolution=12", "resolution=12", "power of two from 4 up, e.g. 8"),
    ("stages.0.resolution=2", "resolution=2", "power of two from 4 up, e.g. 4"),
    ("checkpoints.every_images=0", "checkpoints.every_images=0", "positive"),
    ("checkpoints.keep=0", "checkpoints.keep=0", "at least 1"),
    ("evaluation.when=never", "evaluation.when='never'", "stage, checkpoint, end"),
    ("evaluation.count=1", "evaluation.count=1", "at least 2"),
    ("evaluation.samples=0", "evaluation.samples=0", "at least 1"),
    ("evaluation.deadline_s=-1", "evaluation.deadline_s=-1", "negative"),
    ("evaluation.features=[a:clean]", "evaluation.features=['a:clean']", "something else"),
    ("evaluation.inception=https://host/file?key=1", "evaluation.inception has a query", "Download"),
    ("evaluation.metrics=[sdw]", "evaluation.metrics='sdw'", "did you mean 'swd'"),
    ("evaluation.features=[lite]", "evaluation.features='lite'", "did you mean 'lite0'"),
    ("evaluation.features=[a.b]", "evaluation.features='a.b'", "module:function"),
    ("evaluation.features=[a:same,b:same]", "evaluation.features", "two of the same name"),
    ("evaluation.inception_sha256=6726825d", "evaluation.inception_sha256='6726825d'", "64 digits"),
    ("checkpoints.best=fd_lite0_224", "checkpoints.best='fd_lite0_224'", "swd, fd_pixels16, kid_pixels16"),
    ("name=a/b", "name='a/b'", "plain folder name. Set the parent folder with runs="),
    ("name=..", "name='..'", "plain folder name"),
    ("branch=other", "branch='other'", "continue, new"),
])
def test_a_value_out_of_bounds_names_itself_and_the_rule(recipe: Path, override: str, named: str, rule: str) -> None:
    message = refusal(recipe, override)
    assert named in message, message
    assert rule in message, message


@pytest.mark.parametrize("override", [
    "training.beta1=0.999", "data.max_rejected_share=0", "stages.1.fade_images=0", "stages.1.hold_images=0",
    "checkpoints.keep=1", "evaluation.count=2", "evaluation.samples=1", "training.lr_ramp_images=0", "stages.1.cpus=0",
    "network.fmap_base=8", "resume=16", "resume=fresh", "branch=new"])
def test_the_bound_itself_is_allowed(recipe: Path, override: str) -> None:
    load(recipe, [override])


@pytest.mark.parametrize(("override", "parts"), [
    ("stages=[]", ["stages is empty", "resolution: 4"]),
    ("stages.1.resolution=16", ["[4, 16, 16]", "must double", "[4, 8, 16]"]),
    ("stages.0.resolution=8", ["[8, 8, 16]", "must double", "[8, 16, 32]"]),
    ("network.fmap_base=7", ["network.fmap_base=7", "16px", "at least 8"]),
    ("resume=4", ["resume='4'", "auto, fresh, 8, 16"]),  # nothing lies before the first stage
    ("resume=32", ["resume='32'", "auto, fresh, 8, 16"]),
    ("resume=yes please", ["resume='yes please'", "auto, fresh, 8, 16"]),
    ("stages.0.hold_images=0", ["stage 4px", "hold_images=0", "no fade", "above 0"]),
])
def test_settings_that_do_not_go_together_are_refused(recipe: Path, override: str, parts: list[str]) -> None:
    message = refusal(recipe, override)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(("changes", "numbers"), [
    (["stages.2.batch_size=10"], ["16px", "batch_size=10", "groups of 4", "batch_size=12"]),
    (["stages.2.workers=4"], ["16px", "batch_size=24", "6 minibatch-stddev groups of 4", "4 workers", "workers=3",
                              "multiple of 16"]),
    (["stages.2.workers=7"], ["batch_size=24", "7 workers", "workers=6", "multiple of 28"]),
    (["stages.2.workers=2", "stages.2.micro_batch=8"], ["batch_size=24", "micro_batch=8", "12 images", "groups of 4"]),
    (["stages.2.micro_batch=6"], ["batch_size=24", "micro_batch=6", "24 images", "groups of 4", "micro_batch=4"]),
    (["stages.0.batch_size=3", "stages.0.workers=3"], ["4px", "batch_size=3", "1 minibatch-stddev groups of 3",
                                                       "workers=1"]),
    (["stages.0.batch_size=2", "stages.0.micro_batch=1"], ["batch_size=2", "micro_batch=1", "groups of 2"]),
])
def test_a_batch_that_does_not_split_names_the_numbers(recipe: Path, changes: list[str], numbers: list[str]) -> None:
    message = refusal(recipe, *changes)
    for number in numbers:
        assert number in message, message


@pytest.mark.parametrize("batch", range(1, 33))
def test_a_split_is_accepted_exactly_when_every_forward_pass_gets_whole_groups(batch: int) -> None:
    """Whole groups of min(4, N): brute force over what each worker and each micro-batch would get."""
    for workers in range(1, 9):
        for micro in (0, 1, 2, 3, 4, 6, 8, 12, 16):
            group = min(4, batch)
            share = batch / workers
            passes = share / micro if micro else 1
            size = micro or share
            fits = batch % group == 0 and share % group == 0 and size % group == 0 and passes == int(passes) >= 1
            stage: dict[str, Any] = {"resolution": 4, "batch_size": batch, "workers": workers, "micro_batch": micro}
            try:
                schema.check_shares(schema.Stage(**stage))
                accepted = True
            except UserError:
                accepted = False
            assert accepted == fits, stage


@pytest.mark.parametrize(("batch", "workers"), [(24, 4), (24, 7), (64, 3), (48, 5), (16, 100)])
def test_the_way_out_of_a_bad_worker_count_is_itself_accepted(batch: int, workers: int) -> None:
    with pytest.raises(UserError) as caught:
        schema.check_shares(schema.Stage(resolution=4, batch_size=batch, workers=workers))
    found = re.search(r"Use workers=(\d+), or a batch_size that is a multiple of (\d+)", str(caught.value))
    assert found
    fewer, multiple = map(int, found.groups())
    schema.check_shares(schema.Stage(resolution=4, batch_size=batch, workers=fewer))
    schema.check_shares(schema.Stage(resolution=4, batch_size=multiple, workers=workers))


def test_settings_without_a_default_must_be_given(tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "a.yaml", "data: {shards: x}\nstages:\n  - {batch_size: 8}\n"))
    for name in ("name", "data.source", "stages.0.resolution"):
        assert name in message
    assert "data.shards" not in message
    assert "must be set" in message


def test_a_preset_that_does_not_exist_lists_those_that_do(recipe: Path) -> None:
    message = refusal(recipe, "preset=tow")
    assert message == "preset='tow' is unknown; did you mean 'two'? Use one of: two, big."


def test_a_preset_of_a_recipe_without_presets_says_so(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", RECIPE.partition("presets:")[0])
    message = refusal(path, "preset=two")
    assert "preset='two'" in message
    assert "no presets" in message


@pytest.mark.parametrize(("presets", "chosen"), [("presets: 3", "a"), ("presets: {a: 3}", "a"), ("presets: [a]", "a")])
def test_presets_of_the_wrong_shape_are_one_line(tmp_path: Path, presets: str, chosen: str) -> None:
    path = written(tmp_path / "a.yaml", RECIPE.partition("presets:")[0] + presets)
    assert "presets" in refusal(path, f"preset={chosen}")


@pytest.mark.parametrize(("override", "part"), [
    ("training.seed", "'training.seed'"),  # no equals sign
    ("=3", "'=3'"),
    ("name='x", "not valid YAML"),
    ("name=${", "not valid YAML"),
    ("name=${nothing}", "nothing"),
    ("stages.3.batch_size=8", "override stages.3.batch_size: no item '3' in a list of 3. Use 0 to 2, or *."),
    ("stages.first.batch_size=8", "override stages.first.batch_size: no item 'first'"),
    ("name.x=8", "override name.x: 'x' lies below a plain value."),
    ("stages.0.batch_size.x=8", "override stages.0.batch_size.x: 'x' lies below a plain value."),
])
def test_an_override_that_cannot_be_applied_is_quoted(recipe: Path, override: str, part: str) -> None:
    assert part in refusal(recipe, override)


@pytest.mark.parametrize(("text", "part"), [
    ("a: b: c", "cannot be read as YAML"),
    ("name: a\nname: b", "duplicate key name"),
    ("- 1", "must hold `key: value` lines, not a list"),
    ("just words", "just words"),
    ("name: ${", "cannot be read as YAML"),
    ("name: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ("\0", "cannot be read as YAML"),
])
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path: Path, text: str, part: str) -> None:
    assert part in refusal(written(tmp_path / "a.yaml", text))


def test_a_file_that_is_not_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x80 name")
    assert "cannot be read as YAML" in refusal(tmp_path / "a.yaml")


def test_a_recipe_that_does_not_exist_names_the_bundled_ones() -> None:
    message = refusal("smoek")
    assert "no configuration 'smoek'" in message
    assert "did you mean 'smoke'? Bundled: " in message
    assert "demo" in message


def test_a_user_error_is_a_value_error_and_an_environment_fault_is_not() -> None:
    assert issubclass(UserError, ValueError)
    assert not issubclass(schema.EnvironmentFault, ValueError)


def test_an_encoding_holds_up_to_its_limit_and_the_last_above() -> None:
    data = Data(source="a", shards="b", encoding="raw:16,png:128,jpeg")
    assert {size: data.encoding_of(size) for size in (4, 16, 32, 128, 256, 1024)} == {
        4: "raw", 16: "raw", 32: "png", 128: "png", 256: "jpeg", 1024: "jpeg"}


def test_shards_alone_take_the_settings_of_data_without_their_prefix() -> None:
    data = shard_settings("photos", "out", ["crop=tile", "max_rejected_share=0.5"])
    assert (data.source, data.shards, data.crop, data.max_rejected_share) == ("photos", "out", "tile", 0.5)
    with pytest.raises(UserError, match="did you mean 'crop'"):
        shard_settings("photos", "out", ["corp=tile"])


def test_a_colour_of_hex_digits_is_text_on_the_command_line_too() -> None:
    assert shard_settings("photos", "out", ["background=#102030"]).background == "#102030"


@pytest.mark.parametrize(("kind", "features", "name"), [
    ("fd", "pixels", "fd_pixels16"), ("kid", "lite0", "kid_lite0_224"), ("fd", "inception", "fid"),
    ("kid", "inception_clean", "kid_clean"), ("is", "inception", "is"),
    ("precision", "inception", "precision_inception"),
    ("coverage", "my.nets:clip", "coverage_clip"), ("fd", "inception_mine:embed", "fd_embed")])
def test_a_metric_is_called_as_the_field_calls_it(kind: str, features: str, name: str) -> None:
    assert schema.metric_name(kind, features) == name


def test_a_checkpoint_is_the_best_by_a_distance_that_is_measured_or_by_its_former_name(recipe: Path) -> None:
    assert load(recipe).evaluation.distances() == ["swd", "fd_pixels16", "kid_pixels16"]
    only = ["evaluation.metrics=[fd,neighbors]", "evaluation.features=[lite0_128,a.b:c]"]
    run = load(recipe, [*only, "checkpoints.best=fd_c"])
    assert run.evaluation.distances() == ["fd_lite0_128", "fd_c"]
    assert "Use one of: fd_lite0_128, fd_c." in refusal(recipe, *only)  # swd is the best by default, and not measured
    assert load(recipe, ["checkpoints.best=frechet_pixels16"])
    # what a run measures afterwards need not be what its best is chosen by
    assert dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, metrics=["swd"]))


@pytest.mark.parametrize("name", ["held_out", "inception"])
def test_addresses_of_an_evaluation_hold_no_login(recipe: Path, name: str) -> None:
    assert "user and password" in refusal(recipe, f"evaluation.{name}=http://me:CANARY@host/file")


@pytest.mark.parametrize("name", ["source", "shards"])
def test_a_url_with_a_password_is_refused_before_it_is_written_anywhere(name: str) -> None:
    with pytest.raises(UserError, match="user and password") as caught:
        Data(**{"source": "a", "shards": "b", name: "http://me:CANARY@host/set"})
    assert "CANARY" not in str(caught.value)
