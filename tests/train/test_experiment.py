"""A config is refused before anything is built, with key, value, remedy."""

import json

import pytest

from flowjax import errors, schema
from flowjax.train import experiment


def _config(**model):
  config = experiment.defaults("dit")
  config.model.update(
    image_size=(8, 8), channels=1, num_classes=10, width=32, heads=2, **model
  )
  return config


def test_the_defaults_have_every_key_there_is():
  config = _config()
  built = experiment.build(config)
  assert set(schema.to_dict(built)) == set(config)
  for group in ("model", "data", "optim", "flow", "sample"):
    assert set(schema.to_dict(built)[group]) == set(config[group])


def test_a_saved_config_builds_the_same_experiment():
  built = experiment.build(_config(mlp="swiglu"))
  saved = json.loads(json.dumps(schema.to_dict(built)))
  assert experiment.build(saved) == built


@pytest.mark.parametrize(
  ("group", "key", "value", "text"),
  [
    ("model", "patch_size", 3, "patch_size"),
    ("model", "heads", 5, "heads"),
    ("model", "heads", 16, "head"),
    ("model", "out_channels", 2, "out_channels"),
    ("model", "image_size", (16, 16), "data.image_size"),
    ("flow", "law", {"name": "lognormal"}, "logit_normal"),
    ("flow", "law", {"std": 0.0}, "above 0"),
    ("flow", "law", {"shift": 0.0}, "shift"),
    ("flow", "path", {"name": "vpp"}, "'vp'"),
    ("flow", "path", {"sigma_max": 1.0}, "no option 'sigma_max'"),
    ("flow", "path", {"low": 0.5, "high": 0.2}, "cannot be narrowed"),
    ("flow", "prediction", "epsilon", "noise"),
    ("flow", "prediction", "noise", "is multiplied by"),
    ("flow", "weight", {"name": "min_snrr"}, "min_snr"),
    ("flow", "distance", {"name": "l3"}, "l2"),
    ("flow", "coupling", {"name": "optimal"}, "optimal_transport"),
    ("flow", "coupling", {"name": "pairs"}, "pair_source"),
    ("data", "pair_source", "digits", "pair_source"),
    ("flow", "objective", "likelihood", "maximum_likelihood"),
    ("flow", "learned_variance", True, "table"),
    ("sample", "steps", 0, "steps"),
    ("sample", "solver", {"name": "huen"}, "heun"),
    ("sample", "solver", {"eta": 1.0}, "no option 'eta'"),
    ("sample", "grid", {"shift": -1.0}, "shift"),
    ("sample", "grid", {"name": "karas"}, "karras"),
    ("sample", "guidance", {"interval": (0.5, 0.1)}, "interval"),
    ("sample", "guidance", {"scale": float("nan")}, "finite"),
    ("sample", "guidance", {"name": "apgg"}, "apg"),
    ("optim", "accumulate", 3, "accumulate"),
    ("data", "batch_size", 0, "batch_size"),
    ("data", "images_alone", True, "leaves out the labels"),
  ],
)
def test_impossible_values_are_refused(group, key, value, text):
  values = _config().to_dict()
  if isinstance(value, dict):
    values[group][key].update(value)
  else:
    values[group][key] = value
  with pytest.raises(errors.UserError, match=text):
    experiment.build(values)


@pytest.mark.parametrize("body", ["cudnn", "splash", "ring", "ring_ulysses"])
def test_a_body_without_forward_mode_cannot_find_a_likelihood(body):
  """The divergence of the field is found by `jax.jvp`."""
  config = _config(attention=body)
  experiment.build(config)
  config.flow.objective = "maximum_likelihood"
  with pytest.raises(errors.UserError, match=f"'{body}'.*'blockwise'"):
    experiment.build(config)
  config.model.attention = "blockwise"
  experiment.build(config)


def test_unknown_keys_and_wrong_types_name_the_remedy():
  values = _config().to_dict()
  values["optim"]["learnin_rate"] = 1.0
  with pytest.raises(errors.UserError, match="'learning_rate'"):
    experiment.build(values)
  values = _config().to_dict()
  values["steps"] = "many"
  with pytest.raises(errors.UserError, match="config.steps must be of type"):
    experiment.build(values)
  with pytest.raises(errors.UserError, match="'dit'"):
    experiment.build({**_config().to_dict(), "model": {"name": "dti"}})


def test_a_difference_names_each_leaf():
  a = {"x": {"y": 1, "z": 2}, "w": [1]}
  b = {"x": {"y": 1, "z": 3}, "w": [2]}
  assert schema.difference(a, b) == [
    "config.w: [1] -> [2]",
    "config.x.z: 2 -> 3",
  ]


@pytest.mark.parametrize(
  "ask",
  [
    experiment.defaults,
    lambda name: experiment.build({"model": {"name": name}}),
  ],
)
def test_a_kind_of_model_that_is_none_is_told_which_is_near(ask):
  with pytest.raises(errors.UserError, match="model.name 'dot'.*mean 'dit'"):
    ask("dot")
