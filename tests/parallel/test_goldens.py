"""What compiled steps send: as the table says, and never what no mode needs."""

import functools

import goldens
import pytest

from flowjax.parallel import topology

pytestmark = pytest.mark.slow(1)

HOW = """
If that is meant: look at what it is with
  python tests/parallel/goldens.py --show "{name}"
and write its rows anew with
  python tests/parallel/goldens.py --update "{name}"
"""


@functools.cache
def run_and_moved(name):
  if not goldens.is_possible(name):
    pytest.skip("libtpu is not installed (flowjax[tpu-aot])")
  topology.prepare()
  run = goldens.built(name)
  return run, goldens.moved(run)


each = pytest.mark.parametrize("name", goldens.IN_TESTS)


@each
def test_collectives_are_those_of_the_table(name):
  table = goldens.read()
  _, moved = run_and_moved(name)
  for package, version in goldens.compilers(name).items():
    if version != table[package]:
      pytest.skip(
        f"the table is of {package} {table[package]}, and this is {version},"
        " which may rightly send something else. Look at the differences with"
        " `python tests/parallel/goldens.py`, and where none is a mistake"
        " write the whole table anew with `--update`"
      )
  rows = goldens.differences(name, goldens.entry(moved), table)
  assert not rows, "\n".join([f"{name} sends other than it did:", *rows]) + (
    HOW.format(name=name)
  )


@each
def test_nothing_is_sent_to_all_from_all(name):
  """But in attention where tokens are split: heads, along the last axis."""
  run, moved = run_and_moved(name)
  exchanged = [one for one in moved if one.kind == "all-to-all"]
  meant = [one for one in exchanged if "attention/shard_map" in one.source]
  assert exchanged == meant
  split = [a for a in ("context", "ulysses") if run.mesh.shape[a] > 1]
  assert {one.axes for one in meant} == {(axis,) for axis in split[-1:]}


@each
def test_no_stack_of_layers_is_gathered_whole(name):
  """A stack has a dim of 5 layers, as nothing else has, and more dims."""
  _, moved = run_and_moved(name)
  gathered = [
    one
    for one in moved
    if one.kind == "all-gather"
    for dims in one.shapes
    if dims[:1] == (goldens.LAYERS,) and len(dims) > 2
  ]
  assert gathered == []


@each
def test_layers_are_gathered_in_the_dtype_of_the_compute(name):
  """On a TPU; a CPU computes, and sends, in float32."""
  if name.startswith("cpu"):
    pytest.skip("on a CPU everything is float32")
  _, moved = run_and_moved(name)
  inside = {
    one.dtype for one in moved if one.kind == "all-gather" and one.trips
  }
  assert inside <= {"bf16"}


# Sums over "tensor" in a block: attention and MLP, of text and of image.
SUMS = {"dit": 2, "mmdit": 4, "flux": 4 + 2}


@each
def test_a_block_is_summed_over_tensor_twice_in_a_stream(name):
  run, moved = run_and_moved(name)
  if run.mesh.shape["tensor"] == 1:
    pytest.skip("no tensor axis")
  sums = [
    one
    for one in moved
    if one.kind == "all-reduce"
    and "tensor" in one.axes
    and one.trips
    and "transpose" not in one.source
  ]
  most = SUMS[run.experiment.model.name]
  assert 0 < len(sums) <= most, sums


def test_the_table_is_whole():
  assert set(goldens.IN_TESTS) <= set(goldens.NAMES)
  assert set(goldens.read()) == {"jax", "libtpu", *goldens.NAMES}
