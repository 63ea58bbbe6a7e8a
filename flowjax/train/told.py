"""What a network is told: whether its encoder, the task and the data agree."""

from typing import Any

from flowjax import models


def check(config: Any) -> None:
  """Raises ValueError for parts of an experiment that tell it other things."""
  _check_alone(config)
  _check_text(config)
  _check_layout(config)
  _check_task(config)


def _check_alone(config: Any) -> None:
  """Refuses to leave out what the network is told of images by their source."""
  told = "nothing" if config.embedding.size else models.told(config.model)
  if config.data.images_alone and told != "nothing":
    raise ValueError(
      f"data.images_alone = True leaves out the {told} that this network is "
      "told: set it to False, or take a DiT of model.num_classes = 0, which is "
      "told nothing."
    )


def _check_text(config: Any) -> None:
  """Refuses an encoder of other captions than those of the data."""
  tokenizer = config.data.build_tokenizer()
  if tokenizer is None and config.text.vocabulary:
    raise ValueError(
      f"text.vocabulary = {config.text.vocabulary} is for an encoder of "
      "captions, and data.tokenizer, which makes tokens of them, is not set: "
      "'bytes' or 'words'."
    )
  if tokenizer is None:
    return
  for key, wanted in (
    ("vocabulary", tokenizer.vocabulary),
    ("tokens", tokenizer.length),
  ):
    if getattr(config.text, key) != wanted:
      raise ValueError(
        f"text.{key} = {getattr(config.text, key)}, and data.tokenizer = "
        f"{config.data.tokenizer!r} makes {wanted}: set config.text.{key}="
        f"{wanted}."
      )


def _check_layout(config: Any) -> None:
  """Refuses an encoder of other layouts than those of the data."""
  for key, wanted, of in (
    ("classes", len(config.data.box_names), "data.box_names"),
    ("boxes", config.data.boxes or config.layout.boxes, "data.boxes"),
  ):
    if getattr(config.layout, key) != wanted:
      raise ValueError(
        f"layout.{key} = {getattr(config.layout, key)}, and {of} makes "
        f"{wanted}: set config.layout.{key}={wanted}."
      )


def _check_task(config: Any) -> None:
  """Refuses an encoder of what the task does not tell, and none for it."""
  for name, key, told in (
    ("layout", "layout.classes", config.layout.classes),
    ("variation", "embedding.size", config.embedding.size),
  ):
    if bool(told) != (config.task.name == name):
      raise ValueError(
        f"task.name = {config.task.name!r} and {key} = {told}: the task "
        f"{name!r} needs that above 0, and any other 0."
      )
  if config.embedding.size and config.data.tokenizer:
    raise ValueError(
      f"embedding.size = {config.embedding.size} and data.tokenizer = "
      f"{config.data.tokenizer!r}: a network is told an image or a caption; "
      "leave one out."
    )
  if config.task.name == "variation" and not config.embedding.depth:
    if config.task.noise:
      raise ValueError(
        f"task.noise = {config.task.noise} is of what a learned encoder sees, "
        "and embedding.depth = 0 takes embeddings from the data: set 0.0."
      )
  if config.embedding.size and config.embedding.depth:
    for size in (config.model.image_size, *config.data.buckets):
      if any(side % config.embedding.patch_size for side in size):
        raise ValueError(
          f"embedding.patch_size = {config.embedding.patch_size} does not "
          f"divide images of {size[0]}x{size[1]}."
        )
