"""A network with an encoder of captions: in a config and on a mesh."""

import dataclasses

import jax
import numpy as np
import open_gates
import pytest

from flowjax import errors
from flowjax.data import config as data_config
from flowjax.data import scenes
from flowjax.models import mmdit, text
from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing
from flowjax.train import experiment, loop, manifest, optim, parts

pytestmark = pytest.mark.usefixtures("traced_once")

TOKENS, WIDTH = 13, 16
VOCABULARY = 3 + len(scenes.WORDS)


def captioned(tokens=TOKENS, **groups):
  """Returns a small experiment on scenes."""
  return experiment.Experiment(
    **{
      "steps": 2,
      "model": mmdit.MMDiTConfig(
        image_size=(32, 32),
        channels=3,
        patch_size=8,
        depth=1,
        heads=2,
        head_size=8,
        position="rope2d",
        text_width=WIDTH,
        pooled_width=WIDTH,
        text_tokens=tokens,
      ),
      "data": data_config.DataConfig(
        source="scenes",
        image_size=(32, 32),
        channels=3,
        batch_size=8,
        tokenizer="words",
        tokens=tokens,
        words=scenes.WORDS,
      ),
      "text": text.TextConfig(
        vocabulary=VOCABULARY, tokens=tokens, width=WIDTH, depth=2, heads=2
      ),
      "optim": optim.OptimConfig(learning_rate=1e-3, beta1=0.5),
      **groups,
    }
  )


@pytest.fixture(name="batch", scope="module")
def _batch():
  source = scenes.open(captioned().data, "train")
  drawn = source.gather(np.arange(8))
  token_BL, mask_BL = captioned().data.build_tokenizer()(
    drawn["caption"].tolist()
  )
  return {"image": drawn["image"], "token": token_BL, "token_mask": mask_BL}


def _stepped(run, start, batch):
  """Returns the losses of two steps, and the first gradients by name."""
  state = jax.device_put(start, parts.shardings_of(run.abstract))
  with meshes.use(run.mesh):
    step, put = loop.jit_step(run), placing.put_whole(run.mesh)
    state, first = step(state, put(batch))
    moments = jax.device_get(manifest.named_leaves(state.opt_state[1].mu))
    _, second = step(state, put(batch))
  return [float(v["loss"]) for v in (first, second)], moments


@pytest.mark.slow(5)
def test_eight_devices_train_the_encoder_as_one_does(batch):
  alone = parts.build(captioned(), jax.devices()[:1])
  start = open_gates.first_state(alone)
  wanted, gradients = _stepped(alone, start, batch)
  mesh = meshes.MeshConfig(data=1, fsdp=2, tensor=2, context=2)
  run = parts.build(captioned(mesh=mesh), jax.devices())
  found, others = _stepped(run, start, batch)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  for name, gradient in gradients.items():
    atol = 1e-5 * np.abs(gradient).max()
    np.testing.assert_allclose(
      others[name], gradient, rtol=0, atol=atol, err_msg=name
    )
  kernel = run.abstract.params["text_encoder"]["blocks"]["mlp"]["in"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (2, WIDTH // 2, 32)


@pytest.mark.parametrize(
  ("groups", "said"),
  [
    (
      dict(text=text.TextConfig(vocabulary=9, tokens=TOKENS, width=WIDTH)),
      f"set config.text.vocabulary={VOCABULARY}",
    ),
    (dict(text=text.TextConfig()), "set config.text.vocabulary"),
    (
      dict(data=dataclasses.replace(captioned().data, tokens=9)),
      "set config.text.tokens=9",
    ),
    (
      dict(
        data=dataclasses.replace(
          captioned().data, source="digits", tokenizer=None, words=()
        )
      ),
      "data.tokenizer, which makes tokens",
    ),
  ],
)
def test_captions_and_encoder_that_do_not_fit_are_refused(groups, said):
  with pytest.raises(ValueError, match=said):
    captioned(**groups)


def test_a_network_of_labels_has_no_encoder():
  model = dataclasses.replace(captioned().model, num_classes=10)
  with pytest.raises(errors.UserError, match="config.text: .*reads no text"):
    parts.build(captioned(model=model))
