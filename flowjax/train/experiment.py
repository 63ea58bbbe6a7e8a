"""What a config says: one frozen dataclass per group, checked as a whole.

A file in `configs/` starts from `defaults()`, which has every key there is,
changes some, and returns it. The door turns the result into an `Experiment`;
after that nothing is looked up by string and nothing has a second default.
"""

import collections.abc
import dataclasses
import typing
from typing import Any

import ml_collections

from flowjax import errors, models, schema
from flowjax.data import config as data_config
from flowjax.flow import losses
from flowjax.models import image_encoder as embeddings
from flowjax.models import layout as layouts
from flowjax.models import lora as adapters
from flowjax.models import text as encoders
from flowjax.parallel import mesh as meshes
from flowjax.train import aspects, flows, latents, methods, metrics, tasks, told
from flowjax.train import checkpoint as checkpoints
from flowjax.train import ema as averages
from flowjax.train import optim as optimizers
from flowjax.train import reconstruction as autoencoding


def _group(kind: Any) -> Any:
  return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """How often what is seen, in steps; 0 is never, but for metrics.

  After `hung_after` seconds without a step the run ends, and says where it
  hangs; 0: it never does.
  `backend` writes TensorBoard: "tensorboardX", or "clu", which needs tensorflow
  and tensorboard.
  """

  metrics_every: int = 50
  validation_every: int = 1000
  samples_every: int = 5000
  sample_count: int = 64
  tensorboard: bool = True
  backend: str = "tensorboardX"
  hung_after: int = 1800

  def __post_init__(self):
    _above_zero(self, "metrics_every", "sample_count")
    for name in ("validation_every", "samples_every", "hung_after"):
      if getattr(self, name) < 0:
        raise ValueError(
          f"{name} = {getattr(self, name)} is below 0; 0: never."
        )
    _member("backend", self.backend, metrics.BACKENDS)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A whole run: what is trained on what, how, where, and what is seen."""

  steps: int = 400_000
  seed: int = 0
  # Frozen networks, a folder in diffusers' layout: what encodes and decodes.
  pipeline: str | None = None
  model: Any = None
  data: data_config.DataConfig = _group(data_config.DataConfig)
  encoded: latents.EncodedConfig = _group(latents.EncodedConfig)
  task: tasks.TaskConfig = _group(tasks.TaskConfig)
  flow: flows.FlowConfig = _group(flows.FlowConfig)
  lora: adapters.LoraConfig = _group(adapters.LoraConfig)
  text: encoders.TextConfig = _group(encoders.TextConfig)
  layout: layouts.LayoutConfig = _group(layouts.LayoutConfig)
  embedding: embeddings.EmbeddingConfig = _group(embeddings.EmbeddingConfig)
  optim: optimizers.OptimConfig = _group(optimizers.OptimConfig)
  ema: averages.EmaConfig = _group(averages.EmaConfig)
  mesh: meshes.MeshConfig = _group(meshes.MeshConfig)
  checkpoint: checkpoints.CheckpointConfig = _group(
    checkpoints.CheckpointConfig
  )
  sample: methods.SampleConfig = _group(methods.SampleConfig)
  log: LogConfig = _group(LogConfig)
  reconstruction: autoencoding.ReconstructionConfig = _group(
    autoencoding.ReconstructionConfig
  )

  def __post_init__(self):
    _above_zero(self, "steps")
    if self.optim.warmup_steps >= self.steps and self.steps > 1:
      raise ValueError(
        f"optim.warmup_steps = {self.optim.warmup_steps} must be below steps = "
        f"{self.steps}, or the learning rate is never reached: set "
        f"config.optim.warmup_steps={self.steps // 10}, or more steps."
      )
    if self.data.batch_size % self.optim.accumulate:
      raise ValueError(
        f"data.batch_size = {self.data.batch_size} is not divisible by "
        f"optim.accumulate = {self.optim.accumulate}. Set the batch to "
        "a multiple of it, or config.optim.accumulate to a part."
      )
    for key in ("image_size", "channels"):
      ours, theirs = getattr(self.model, key), getattr(self.data, key)
      if ours != theirs:
        raise ValueError(
          f"model.{key} = {ours} and data.{key} = {theirs} must be the same."
        )
    aspects.check(self.model, self.data)
    aspects.check_canvas(self.model, self.data, self.flow, self.task)
    if self.is_autoencoder:
      self._check_autoencoder()
      return
    if self.reconstruction != autoencoding.ReconstructionConfig():
      raise ValueError(
        "reconstruction is for autoencoders and would be without effect on a "
        f"model {self.model.name!r}; leave it as it is by default."
      )
    self._check_task()
    told.check(self)
    self._check_objective()
    self._check_sampling()
    self._check_channels()
    paired = self.flow.coupling.name == "pairs"
    if paired != (self.data.pair_source is not None):
      raise ValueError(
        f"flow.coupling.name = {self.flow.coupling.name!r} and "
        f"data.pair_source = {self.data.pair_source!r}: a flow from images to "
        'images needs the coupling "pairs" and the source of the images at '
        "t = 1, and any other flow neither."
      )

  @property
  def is_autoencoder(self) -> bool:
    """Whether images are to be reconstructed, and no flow is learned."""
    return self.model.name in models.AUTOENCODERS

  def network(self) -> models.Network:
    """Returns the network with all parameters that its loss needs.

    Adapters have to be added before they are trained.
    """
    network = models.build(self.model)
    if self.is_autoencoder:
      return self.reconstruction.network(network)
    return network

  def loss(self, network: models.Network) -> losses.Loss:
    """Returns the training loss of a network."""
    if self.is_autoencoder:
      return autoencoding.loss(self.reconstruction, network)
    return self.flow.loss(network)

  def validation_loss(self, network: models.Network) -> losses.Loss:
    """Returns the loss of held-out examples, in which no weight is drawn."""
    if self.is_autoencoder:
      return autoencoding.validation_loss(self.reconstruction, network)
    return self.flow.validation_loss(network)

  def require_context(self) -> None:
    """Refuses a network that reads channels which nothing here makes."""
    read = getattr(self.model, "context_channels", 0)
    if read and self.task.name == "none":
      raise errors.UserError(
        f"config.model.context_channels = {read}, and config.task.name = "
        "'none' makes no context: set config.task.name='inpainting' or "
        "'super_resolution', as the network was trained for."
      )

  def _check_autoencoder(self):
    """Refuses what an autoencoder would not heed."""
    with errors.naming("config.reconstruction"):
      self.reconstruction.check(self.model)
    for name, kind in (
      ("task", tasks.TaskConfig),
      ("flow", flows.FlowConfig),
      ("sample", methods.SampleConfig),
      ("lora", adapters.LoraConfig),
      ("text", encoders.TextConfig),
      ("layout", layouts.LayoutConfig),
      ("embedding", embeddings.EmbeddingConfig),
    ):
      if getattr(self, name) != kind():
        raise ValueError(
          f"{name} is for networks of a flow and would be without effect on a "
          f"model {self.model.name!r}; leave it as it is by default."
        )
    if self.data.pair_source is not None:
      raise ValueError(
        f"data.pair_source = {self.data.pair_source!r} is for flows between "
        "images; an autoencoder has one image at a time."
      )

  def _check_task(self):
    """Refuses a task that this model or this flow cannot be told."""
    if self.task.name != "none" and self.data.pair_source is not None:
      raise ValueError(
        f"task.name = {self.task.name!r} and data.pair_source = "
        f"{self.data.pair_source!r}: a flow between images has its other image "
        "at t = 1, and a task tells it beside one that flows from noise. Leave "
        "out one of them."
      )
    with errors.naming("config.task"):
      sizes = (self.model.image_size, *self.data.buckets)
      self.task.check(self.model, sizes)

  def _check_sampling(self):
    """Refuses a way to sample that this flow or this model does not allow."""
    tokens, coupling = flows.tokens_of(self.model), self.flow.coupling.name
    self.flow.law.build(self.flow.path.build(), tokens)
    with errors.naming("config.sample"):
      method = self.sample.method(self.flow, tokens)
    spread = self.flow.coupling.build().spread is not None
    if getattr(method.solver, "stochastic", False) and (
      spread or coupling in flows.DEPENDENT
    ):
      raise ValueError(
        f"sample.solver.name = {method.solver.name!r} draws noise by a score "
        "that only x_t of noise drawn apart from the data has; after the "
        f"coupling {coupling!r}{' with its sigma' if spread else ''} follow "
        "the ODE, as 'heun' does."
      )
    scale = self.sample.guidance.scale
    if models.told(self.model) == "nothing" and scale != 1.0:
      raise ValueError(
        f"sample.guidance.scale = {scale}: a network of num_classes = 0 is "
        "told nothing, and there is no condition to guide towards: set 1.0."
      )
    told = self.sample.guidance.name == "distilled"
    if told and not getattr(self.model, "guidance_embed", False):
      raise ValueError(
        "sample.guidance.name = 'distilled' is for a network that is told the "
        "scale, as FLUX with model.guidance_embed; this one is guided by 'cfg'."
      )
    self.sample.guidance.pushes(models.build(self.model))

  def _check_objective(self):
    """Refuses a model that cannot be trained by the objective."""
    invertible = self.model.name == "coupling"
    if invertible and self.flow.objective != "maximum_likelihood":
      raise ValueError(
        f"flow.objective = {self.flow.objective!r}: a model of coupling layers "
        "is trained by 'maximum_likelihood'."
      )
    if invertible and self.sample.guidance.scale != 1.0:
      raise ValueError(
        f"sample.guidance.scale = {self.sample.guidance.scale}: a model of "
        "coupling layers has no field to guide; set 1.0."
      )
    body = getattr(self.model, "attention", "auto")
    if (
      not invertible
      and self.flow.objective == "maximum_likelihood"
      and body in models.REVERSE_ALONE
    ):
      raise ValueError(
        f"model.attention = {body!r} knows reverse mode alone, and the "
        "divergence of 'maximum_likelihood' along the ODE is a derivative in "
        "forward mode: set config.model.attention='auto' or 'blockwise'."
      )

  def _check_channels(self):
    """Refuses a network whose output is not what the flow predicts."""
    if not hasattr(self.model, "out_channels"):
      return
    wanted = self.model.channels * (2 if self.flow.learned_variance else 1)
    found = self.model.out_channels or self.model.channels
    if found != wanted:
      raise ValueError(
        f"model.out_channels = {self.model.out_channels}, where the flow needs "
        f"{wanted}: one per channel of the image, twice that with "
        "flow.learned_variance."
      )


def defaults(model: str = "dit") -> ml_collections.ConfigDict:
  """Returns a locked config with every key there is, for a kind of model.

  Raises UserError for a kind that is none.
  """
  _require_known(model)
  groups = {
    field.name: field.default
    if field.default_factory is dataclasses.MISSING
    else field.default_factory()
    for field in dataclasses.fields(Experiment)
  }
  return _config_dict({**groups, "model": models.CONFIGS[model]()})


def to_config_dict(config: Experiment) -> ml_collections.ConfigDict:
  """Returns the locked config of an experiment, as `build` takes it."""
  return _config_dict(
    {
      field.name: getattr(config, field.name)
      for field in dataclasses.fields(config)
    }
  )


def build(values: collections.abc.Mapping) -> Experiment:
  """Builds the experiment of a config, or of the dict saved in a workdir.

  Raises UserError with the key, the value and what would do.
  """
  if isinstance(values, ml_collections.ConfigDict):
    values = values.to_dict()
  values = dict(values)
  model = dict(values.pop("model", None) or {})
  name = model.get("name")
  _require_known(name)
  network = schema.build(models.CONFIGS[str(name)], model, "config.model")
  return schema.build(Experiment, {**values, "model": network}, "config")


def _require_known(name: Any) -> None:
  if name not in models.CONFIGS:
    raise errors.UserError(
      f"Unknown config.model.name {name!r}. "
      f"{schema.closest(str(name), models.CONFIGS)}"
    )


def _config_dict(groups: dict[str, Any]) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  for key, value in groups.items():
    if dataclasses.is_dataclass(value):
      hints = typing.get_type_hints(type(value))
      config[key] = _config_dict(
        {
          field.name: _placeholder(hints[field.name])
          if getattr(value, field.name) is None
          else getattr(value, field.name)
          for field in dataclasses.fields(value)
        }
      )
    elif value is None:
      config[key] = _placeholder(typing.get_type_hints(Experiment)[key])
    else:
      config[key] = value
  return config.lock()


def _placeholder(hint: Any) -> Any:
  """Returns a None that a value of the optional type can replace."""
  (kind,) = [k for k in typing.get_args(hint) if k is not type(None)]
  return ml_collections.config_dict.placeholder(kind)


def _member(name: str, value: str, table: collections.abc.Iterable[str]):
  if value not in table:
    raise ValueError(f"{name} = {value!r}. {schema.closest(value, table)}")


def _above_zero(config: Any, *names: str) -> None:
  for name in names:
    if not getattr(config, name) > 0:
      raise ValueError(f"{name} = {getattr(config, name)} must be above 0.")
